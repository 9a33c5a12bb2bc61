"""A run on a cluster of a head alone, to which an autoscaler adds nodes of two kinds: to train, and for views."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simclr_ray.data.manifest import Manifest
from simclr_ray.data.shards import ImageRow
from tests.conftest import make_data_set, real_rows
from tests.faults.commands import losses, recipe
from tests.faults.growing import NodeType, alive_by_label, alive_nodes, growing_cluster, watched

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
TRAIN, DATA = {"simclr-role": "train"}, {"ray-subcluster": "data"}
"""Of the second key Ray's own autoscaling takes notice: with another, it counts the CPUs of both kinds together."""


TYPES = {"train": NodeType(1, 4, TRAIN), "data": NodeType(2, 1, DATA)}
"""The node that trains has CPUs to spare, which must not keep those for views from being asked for."""


def grown(tmp_path: Path, manifest: Manifest, **changes: Any) -> tuple[Counter[str], str]:
    """Train on a head alone: the most nodes of each kind that there were at a time, and all that was printed."""
    with growing_cluster(tmp_path, TYPES) as address:
        file = recipe(
            tmp_path / "run", manifest, cluster__address=address, cluster__workers=1, cluster__start_timeout_s=400.0,
            cluster__train_labels=TRAIN, cluster__data_labels=DATA, **changes,
        )  # fmt: skip
        assert alive_nodes(address) == 1
        with watched(lambda: [alive_by_label(address, key) for key in (*TRAIN, *DATA)], every_s=0.5) as seen:
            process = subprocess.run(
                [sys.executable, "-m", "simclr_ray.cli", "pretrain", str(file)], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=1000, check=False,
            )  # fmt: skip
    assert process.returncode == 0, process.stdout
    most = reduce(or_, (counted for look in seen for counted in look), Counter[str]())
    return most, process.stdout


@pytest.mark.parametrize("min_workers", [None, 1])
def test_a_head_alone_gets_a_node_to_train_and_one_for_views(
    data_set: Manifest, tmp_path: Path, min_workers: int | None
) -> None:
    most, output = grown(tmp_path, data_set, train__steps=40, cluster__min_workers=min_workers)
    assert len(losses(tmp_path / "run")) == 40
    assert most["train"] == 1
    assert most["data"] >= 1, output


def test_a_stream_that_is_too_slow_gets_another_node_for_views_while_it_runs(tmp_path: Path) -> None:
    """Large pictures for small views: decoding takes far longer than training."""
    manifest = make_data_set(tmp_path / "large", [enlarged(row) for row in real_rows(128)], shard_rows=64)
    most, output = grown(
        tmp_path, manifest, train__steps=100, views__scaled_decode=False, data__units_per_task=1,
        optim__warmup_epochs=1,
    )  # fmt: skip
    assert most == {"train": 1, "data": 2}, output


def enlarged(row: ImageRow) -> ImageRow:
    file = io.BytesIO()
    Image.open(io.BytesIO(row.image)).convert("RGB").resize((1600, 1600)).save(file, "JPEG", quality=90)
    return ImageRow(file.getvalue(), row.label, row.uri)
