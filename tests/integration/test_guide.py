"""The documentation's commands as a newcomer would type them: in one folder, page after page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from simclr_ray.cli import main
from simclr_ray.data.manifest import read_manifest
from simclr_ray.data.shards import ImageRow
from simclr_ray.publish.record import read_record
from simclr_ray.train.pretrain import pretrain
from tests.conftest import ROOT, real_rows
from tests.unit.test_docs import BLOCKS, commands

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROWS = 1200


def write_images(folder: Path, rows: list[ImageRow]) -> None:
    """A folder for each class, as most sources have it."""
    for number, row in enumerate(rows):
        place = folder / f"class-{row.label}" / f"{number:05d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(row.image)).convert("RGB").save(place)


def run_page(page: str) -> None:
    """Every block of a page that is to be run slowly, in its order; each command must end well."""
    blocks = [block for block in BLOCKS if block.run == "run slowly" and block.page == ROOT / "docs" / page]
    assert blocks
    for block in blocks:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {"__name__": "docs"})
        else:
            found = list(commands(block))
            assert found
            for arguments in found:
                assert main(arguments) == 0, (str(block), arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_a_first_run(place: Path) -> None:
    """By the demo's recipe; the Python block goes on with the same run."""
    run_page("index.md")
    record = read_record("runs/first")
    assert record.status == "finished"
    accuracy = record.result("linear_top1")
    assert accuracy is not None
    assert accuracy > 0.7
    assert (place / "report.html").stat().st_size > 100_000


def test_your_images_and_what_is_done_with_a_run_of_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = real_rows(ROWS)
    write_images(place / "SOURCE", rows)
    write_images(place / "LABELLED", rows[:800])
    write_images(place / "LABELLED_TEST", rows[800:])
    run_page("your-images.md")
    assert read_manifest("data/mine").rows == read_manifest("data/listed").rows == ROWS
    assert read_manifest("data/labelled").classes == read_manifest("data/labelled-test").classes
    make_runs(place)
    capsys.readouterr()
    run_page("after-training.md")
    told = capsys.readouterr().out
    assert len([line for line in told.splitlines() if "data/mine" in line or "SOURCE" in line]) >= 10, "neighbours"
    assert (place / "out" / "SHA256SUMS").exists()
    assert load_file(place / "out" / "encoder.safetensors")
    student = read_record("runs/student")
    assert (student.status, student.config and student.config.distill.labels) == ("finished", "teacher")
    labels = load_file(place / "runs/mine/eval/classifier-finetune-10pc.safetensors")["seen.labels"]
    assert len(labels) == 80


def recipe_of(page: str) -> dict[str, Any]:
    """The recipe that a page shows, made small enough for a test: what it says of data, test sets and loss stays."""
    (block,) = (block for block in BLOCKS if block.language == "yaml" and block.page == ROOT / "docs" / page)
    recipe = yaml.safe_load(block.text)
    recipe["views"] |= {"preset": "cifar", "size": 16}
    recipe["model"] = {"encoder": "small", "projection_dim": 16}
    recipe["optim"] = {"name": "lars", "rule": "constant", "base_learning_rate": 0.01, "warmup_epochs": 0}
    recipe["train"] = {"global_batch": 64, "steps": 12}
    return dict(recipe)


def make_runs(place: Path) -> None:
    """What the pages have made by their recipes."""
    recipe = recipe_of("your-images.md")
    recipe["evaluate"]["num_labels"] = None
    pretrain(recipe)
    (place / "student.yaml").write_text(yaml.safe_dump(recipe_of("after-training.md")))
