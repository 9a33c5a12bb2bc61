"""Real runs for the tests of reports: seconds of training on images of which some are broken, under hostile names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from simclr_ray.data.manifest import Manifest, write_manifest
from simclr_ray.data.shards import ImageRow
from simclr_ray.evaluate.evaluate import evaluate
from simclr_ray.train.pretrain import pretrain
from tests.conftest import make_data_set, real_rows, small_run

HOSTILE = (
    '<script>window.pwned=1</script>',
    '"><img src=x onerror="window.pwned=2">',
    "' onmouseover='window.pwned=3",
    "a\nb\r\x1b[2J\x00\u202ec",
    "</style><svg onload=window.pwned=4>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:window.pwned=5",
)  # fmt: skip
SECRET = "planted0SECRET1planted"
SIGNED = f"https://someone:{SECRET}@images.example/cat.jpg?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}"
FOLDER = "\"'><img src=x onerror=window.pwned=6>\x1b[2J"
"""A run folder of a name that could not be worse, but for slashes."""


def hostile_data(folder: Path) -> Manifest:
    """192 real images, a tenth of them broken and named by strangers, in classes named by the same."""
    bad = [*HOSTILE, SIGNED]
    rows = [
        ImageRow(b"", row.label, bad[i // 10 % len(bad)] + str(i)) if i % 10 == 0 else row
        for i, row in enumerate(real_rows(192))
    ]
    manifest = make_data_set(folder, rows)
    classes = (*HOSTILE, "plain", "other", "last")
    manifest = replace(manifest, classes=classes)
    write_manifest(manifest)
    return manifest


def trained(folder: Path, manifest: Manifest) -> Path:
    """A run of eight steps, evaluated."""
    settings: dict[str, Any] = {
        "train__steps": 8, "optim__warmup_epochs": 0.1, "data__max_rejected_fraction": 1.0
    }  # fmt: skip
    config = small_run(folder, manifest, **settings, evaluate__test=manifest.folder, evaluate__seeds=(0,))
    pretrain(config)
    evaluate(str(folder), pictures=False)
    return folder
