"""Exports load in the plain library with the code that their card gives, and give the run's outputs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr_ray import export, load_encoder, storage
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.model.encoder import SamePool
from simclr_ray.publish.card import _line
from simclr_ray.publish.export import SUMS_NAME
from simclr_ray.train.build import build_model
from tests.conftest import make_data_set, real_rows
from tests.unit.evaluate.test_evaluate import make_run, settings
from tests.unit.publish.made import results, supervised

SETTINGS = {
    "small": ["model.encoder=small"],
    "resnet18": ["model.encoder=resnet18", "views.size=32"],
    "resnet18-cifar": ["model.encoder=resnet18", "model.stem=cifar"],
    "resnet18-same": ["model.encoder=resnet18", "model.stem=imagenet-same", "views.size=64"],
    "resnet18-2x": ["model.encoder=resnet18", "model.width=2"],
    "resnet50": ["model.encoder=resnet50", "views.size=32", "views.flavour=paper"],
}


LARGE = [("resnet18-2x", "safetensors"), *(("resnet50", one) for one in ("safetensors", "torchvision", "timm"))]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    manifest = make_data_set(tmp_path_factory.mktemp("data"), real_rows(100))
    return manifest, manifest


@pytest.fixture(scope="module")
def runs(sets: tuple[Manifest, Manifest], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("runs")
    return Made(lambda name: make_run(settings(base / name, sets, *SETTINGS[name]), sets[0]))


class Made(dict[str, str]):
    """Runs by name, made when they are asked for."""

    def __init__(self, make: Callable[[str], str]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> str:
        self[name] = self._make(name)
        return self[name]


def loaded_by_the_card(folder: Path) -> Any:
    """Run the code block of an export's README.md, in its folder, as a reader would."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(before)
    return names.get("model", names.get("session"))


def images_of(size: int) -> torch.Tensor:
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("small", "safetensors"),
        *(
            (name, format)
            for name in ("resnet18", "resnet18-cifar", "resnet18-same")
            for format in ("torchvision", "timm")
        ),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in LARGE),
    ],
)
def test_the_cards_code_loads_it_and_outputs_are_equal(
    runs: dict[str, str], tmp_path: Path, name: str, format: Any
) -> None:
    report = export(runs[name], str(tmp_path / "out"), format=format)
    model = loaded_by_the_card(tmp_path / "out")
    assert not model.training
    trained = load_encoder(runs[name])
    images = images_of(trained.policy.size)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), trained.model.encoder(images), rtol=1e-6, atol=1e-6)
    assert report.difference <= 1e-6
    if format != "safetensors":
        assert type(model).__module__.split(".")[0] == format


def test_timm_builds_the_network_from_the_folder_alone(runs: dict[str, str], tmp_path: Path) -> None:
    import timm

    export(runs["resnet18"], str(tmp_path / "out"), format="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    trained = load_encoder(runs["resnet18"])
    images = images_of(trained.policy.size)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), trained.model.encoder(images), rtol=1e-6, atol=1e-6)
    assert list(model.pretrained_cfg["mean"]) == list(trained.policy.mean or (0, 0, 0))
    assert list(model.pretrained_cfg["input_size"]) == [3, 32, 32]


@pytest.mark.parametrize("name", ["small", "resnet18-same"])
def test_onnx_gives_the_same_numbers_for_any_number_of_images(runs: dict[str, str], tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    report = export(runs[name], str(tmp_path / "out"), format="onnx", projector=True)
    assert report.difference <= 1e-4
    session = loaded_by_the_card(tmp_path / "out")
    trained = load_encoder(runs[name])
    size = trained.policy.size
    raw = np.random.default_rng(0).integers(0, 256, (7, size, size, 3), dtype=np.uint8)
    for count in (1, 7):
        pixels = np.ascontiguousarray(raw[:count].transpose(0, 3, 1, 2)).astype(np.float32) / 255
        h, z = session.run(None, {"images": pixels})
        expected = trained.model.embed(_normalised(raw[:count], trained))
        torch.testing.assert_close(torch.from_numpy(h), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(z), trained.model.projector(expected), rtol=1e-3, atol=1e-4)


def _normalised(raw: np.ndarray, trained: Any) -> torch.Tensor:
    from simclr_ray.views.apply import normalise

    return normalise(torch.from_numpy(raw), trained.policy)


@pytest.mark.parametrize(("name", "words"), [("small", "no encoder like `small`"), ("resnet18-2x", "model.width")])
@pytest.mark.parametrize("format", ["torchvision", "timm"])
def test_what_a_library_cannot_build_is_refused(
    runs: dict[str, str], tmp_path: Path, name: str, words: str, format: Any
) -> None:
    with pytest.raises(ConfigError, match="safetensors") as caught:
        export(runs[name], str(tmp_path / "out"), format=format)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_complete_export_has_checksums_of_all_its_files(runs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(runs["small"], str(out), projector=True, licence="Apache-2.0")
    assert sorted(report.files) == sorted(path.name for path in out.iterdir())
    listed = dict(reversed(line.split("  ")) for line in (out / SUMS_NAME).read_text().splitlines())
    assert listed == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in report.files if name != SUMS_NAME
    }
    card = (out / "README.md").read_text()
    assert "license: Apache-2.0" in card
    assert listed["encoder.safetensors"] in card
    assert json.loads((out / "config.json").read_text())["model"]["encoder"] == "small"


def test_an_export_is_not_overwritten_and_one_that_was_begun_is_made(runs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(runs["small"], str(out))
    with pytest.raises(ConfigError, match="already"):
        export(runs["small"], str(out))
    (out / SUMS_NAME).unlink()
    with pytest.raises(ConfigError, match="not empty"):
        export(runs["small"], str(out))
    (out / "_begun.json").write_text("{}")
    (out / "model.onnx").write_bytes(b"half")
    export(runs["small"], str(out))
    assert not (out / "model.onnx").exists()
    assert not (out / "_begun.json").exists()


def test_the_card_tells_what_was_measured_and_nothing_of_places(runs: dict[str, str], tmp_path: Path) -> None:
    eval_folder = Path(runs["small"]) / "eval"
    test = "https://user:word@host/place|x`\n/test?X-Amz-Signature=abc"
    for name, numbers in (
        ("results", results(0.819, test=test) | {"step": 7}),
        ("protocols", supervised([0.79, 0.80, 0.81], test=test)),
        ("birds/results", results(0.4, test="/data/birds/test")),
    ):
        storage.write_bytes(f"{eval_folder}/{name}.json", json.dumps(numbers).encode())
    try:
        export(runs["small"], str(tmp_path / "out"))
    finally:
        storage.delete_folder(str(eval_folder))
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\| trained encoder \| 50.0 \| 81.9 \|", card)
    assert "| finetune, 10% | 1,200 | 80.0 [77.5, 82.5] | 3 | 12 |" in card
    assert card.index("### Transfer: birds") < card.index("test set `birds/test`") < card.index("## Training")
    assert card.count("those weights are not part of this export") == 1
    assert "abc" not in card
    assert "word" not in card
    assert "step 7, not of this export" in card
    assert str(tmp_path.parent) not in card
    assert _line("a`b|c\n\x1b[31m") == "a'b/c \\x1b[31m"


def test_a_result_that_cannot_be_read_is_not_told_as_none(runs: dict[str, str], tmp_path: Path) -> None:
    torn = Path(runs["small"]) / "eval" / "results.json"
    storage.write_bytes(str(torn), b"{")
    try:
        with pytest.raises(DataError, match="cannot tell what was measured"):
            export(runs["small"], str(tmp_path / "out"))
    finally:
        storage.delete_folder(str(torn.parent))


@pytest.mark.parametrize("size", [6, 7, 12, 13])
def test_same_pooling_looks_at_tensorflows_windows(size: int) -> None:
    """TensorFlow: pad_total = max((ceil(n / 2) - 1) * 2 + 3 - n, 0), the smaller half before."""
    x = torch.randn(2, 3, size, size)
    total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
    before, after = total // 2, total - total // 2
    padded = torch.full((2, 3, size + total, size + total), float("-inf"))
    padded[:, :, before : before + size, before : before + size] = x
    assert after in (0, 1)
    windows = padded.unfold(2, 3, 2).unfold(3, 3, 2)
    assert torch.equal(SamePool()(x), windows.amax(dim=(-1, -2)))


def test_the_stem_is_the_only_difference_of_same(sets: tuple[Manifest, Manifest]) -> None:
    same, usual = (
        build_model(settings(Path("x"), sets, "model.encoder=resnet18", f"model.stem={stem}"))
        for stem in ("imagenet-same", "imagenet")
    )
    assert same.state_dict().keys() == usual.state_dict().keys()
