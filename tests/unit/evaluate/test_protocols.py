"""Training with labels: which labels, in what order, by whose recipe, and what is written of it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from simclr_ray import load_encoder
from simclr_ray.config import DistillConfig
from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate.encode import read_labelled
from simclr_ray.evaluate.evaluate import evaluate
from simclr_ray.evaluate.intervals import interval95
from simclr_ray.evaluate.linear import PAPER_L2_GRID
from simclr_ray.evaluate.protocols import PROTOCOLS_NAME, SupervisedRow, _write
from simclr_ray.evaluate.subsets import part_of_labels, read_file_list, rows_of_list
from simclr_ray.evaluate.supervised import (
    RATES,
    Kind,
    Recipe,
    accuracy,
    batches,
    body_of,
    crops,
    crops_and_flips,
    read_training_images,
    recipe_of,
    train_classifier,
)
from simclr_ray.model.projector import make_projector
from simclr_ray.model.simclr import SimCLR
from simclr_ray.train.teacher import labels_of_teacher, load_teacher
from tests.conftest import all_rows, make_data_set, real_rows
from tests.unit.evaluate.test_evaluate import make_run, settings


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    folder = tmp_path_factory.mktemp("sets")
    return make_data_set(folder / "train", real_rows(400)), make_data_set(folder / "test", real_rows(200, "test"))


@pytest.fixture
def run(sets: tuple[Manifest, Manifest], tmp_path: Path) -> str:
    return make_run(settings(tmp_path / "run", sets), sets[0])


def test_recipes_are_the_papers() -> None:
    """SimCLR, appendix B.5 and B.6, at ImageNet's size: rates 1.6 and 0.8 at 4096, 90, 60 and 30 epochs."""
    whole = {"of": 1_281_167, "batch": None, "epochs": None, "seed": 0}
    probe = recipe_of("sgd", labels=1_281_167, **whole)  # type: ignore[arg-type]
    assert (probe.peak, probe.epochs) == (pytest.approx(1.6), 90)
    tuned = [recipe_of("finetune", labels=n, **whole) for n in (12_811, 128_116, 1_281_167)]  # type: ignore[arg-type]
    assert [one.epochs for one in tuned] == [60, 30, 30]
    assert all(one.peak == pytest.approx(0.8) for one in tuned)
    assert {one.batch for one in (probe, *tuned)} == {4096}
    v2 = recipe_of("finetune_v2", labels=12_811, **whole)  # type: ignore[arg-type]
    assert (v2.batch, v2.peak, v2.epochs) == (1024, pytest.approx(0.16), 60)  # SimCLR v2, section 3
    assert RATES["finetune"] == ("linear", 0.05)
    assert len(PAPER_L2_GRID) == 45
    assert (PAPER_L2_GRID[0], PAPER_L2_GRID[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))
    ratios = [b / a for a, b in itertools.pairwise(PAPER_L2_GRID)]
    assert ratios == pytest.approx([ratios[0]] * 44)


def test_fewer_labels_than_a_batch_are_one_step_with_the_rate_of_their_number() -> None:
    few = recipe_of("finetune", labels=128, of=60_000, batch=4096, epochs=7, seed=0)
    assert (few.batch, few.epochs, few.peak) == (128, 7, pytest.approx(0.025))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.integers(0, 5))
def test_steps_are_permutations_one_after_another(count: int, batch: int, steps: int, seed: int) -> None:
    used = [one for step in batches(count, batch, steps, seed) for one in step]
    assert len(used) == batch * steps
    for epoch in range(len(used) // count):
        rows = used[epoch * count : (epoch + 1) * count]
        assert sorted(row for row, _ in rows) == list(range(count))
        assert {one for _, one in rows} == {epoch}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1.0])
def test_parts_of_labels_are_balanced_and_drawn_by_the_seed(fraction: float) -> None:
    labels = torch.arange(1000) % 10
    rows = part_of_labels(labels, fraction, 10, seed=1)
    assert torch.bincount(labels[rows]).tolist() == [round(fraction * 100)] * 10
    assert torch.equal(rows, part_of_labels(labels, fraction, 10, seed=1))
    if fraction < 1:
        assert not torch.equal(rows, part_of_labels(labels, fraction, 10, seed=2))


def test_a_published_list_names_files_whatever_their_folder(tmp_path: Path) -> None:
    (tmp_path / "1percent.txt").write_text("n01440764_10026.JPEG\nn02085620_1.JPEG\n\n")
    names = read_file_list(str(tmp_path / "1percent.txt"))
    uris = ["s3://b/train/n02085620/n02085620_1.JPEG", "x/n02085620_11.JPEG", "shard.tar#n01440764_10026.JPEG"]
    assert rows_of_list(names, uris, "list").tolist() == [0, 2]
    with pytest.raises(DataError, match="1 of 2 files of the list are not in the data set"):
        rows_of_list(names, uris[:2], "list")
    with pytest.raises(DataError, match="several images"):
        rows_of_list(names, [*uris, "other/n02085620_1.JPEG"], "list")
    (tmp_path / "twice.txt").write_text("a\na\n")
    for name, words in (("twice.txt", "names one twice"), ("absent.txt", "no list of files")):
        with pytest.raises(DataError, match=words):
            read_file_list(str(tmp_path / name))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_intervals_are_students(values: list[float]) -> None:
    found = interval95(values)
    assert found.low <= found.mean <= found.high
    half = found.high - found.mean
    assert half >= 1.95 * statistics.stdev(values) / math.sqrt(len(values)) - 1e-9


def test_three_seeds_have_the_tables_interval() -> None:
    found = interval95([0.80, 0.82, 0.84])
    assert found.mean == pytest.approx(0.82)
    assert found.high - found.mean == pytest.approx(4.303 * 0.02 / math.sqrt(3), rel=1e-6)
    assert math.isnan(interval95([0.5]).low)


def test_views_are_crops_and_flips_and_nothing_else(sets: tuple[Manifest, Manifest], run: str) -> None:
    images = read_training_images(sets[0], Limits())
    policy = load_encoder(run).policy
    plain = crops_and_flips(policy)
    assert (plain.jitter_probability, plain.grayscale_probability, plain.blur_probability) == (0, 0, 0)
    assert plain.crop_scale == policy.crop_scale
    one, other = (crops(images, [(5, epoch), (9, epoch)], policy, Limits(), 0) for epoch in (0, 1))
    assert one.shape == (2, policy.size, policy.size, 3)
    assert not np.array_equal(one, other)
    assert np.array_equal(one, crops(images, [(5, 0), (9, 0)], policy, Limits(), 0))
    assert (one[..., :1] == one).all(), "gray images stay gray: no colour was touched"


def test_the_probe_leaves_the_encoder_alone_and_fine_tuning_moves_it(sets: tuple[Manifest, Manifest], run: str) -> None:
    images, trained = read_training_images(sets[0], Limits()), load_encoder(run)
    before = {name: value.clone() for name, value in trained.model.encoder.state_dict().items()}
    made = {
        kind: train_classifier(
            *body_of(trained, kind, everything=False), images, trained.policy, Limits(), Recipe(kind, 128, 2, 0),
            num_classes=10,
        )
        for kind in get_args(Kind)
    }  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in trained.model.encoder.state_dict().items())
    probe = made["sgd"].body.state_dict()
    assert all(torch.equal(value, before[name.removeprefix("encoder.")]) for name, value in probe.items())
    for kind in ("finetune", "finetune_v2"):
        tuned = made[kind].body.state_dict()
        assert not torch.equal(tuned["encoder.conv1.weight"], before["conv1.weight"])
        assert not torch.equal(tuned["encoder.bn1.running_mean"], before["bn1.running_mean"])
        assert {name.partition(".")[0] for name in tuned} == {"encoder", *(["layer"] if kind == "finetune_v2" else [])}
    layer = trained.model.projector.state_dict()["0.weight"]
    assert not torch.equal(made["finetune_v2"].body.state_dict()["layer.0.weight"], layer)
    assert made["sgd"].steps == round(400 * 2 / 128)


def test_protocols_are_measured_and_written_with_seeds_cost_and_fingerprints(
    sets: tuple[Manifest, Manifest], run: str
) -> None:
    overrides = [
        "evaluate.protocols=[sgd, finetune]", "evaluate.fractions=[0.1, 1.0]", "evaluate.supervised_epochs=1",
        "evaluate.supervised_batch=200", "evaluate.name=clothes",
    ]  # fmt: skip
    result = evaluate(run, overrides, pictures=False)
    assert result.folder == f"{run}/eval/clothes"
    assert result.rows == ()
    said: dict[str, Any] = json.loads((Path(result.folder) / "protocols.json").read_text())
    assert said["manifests"] == {
        "pretraining": sets[0].fingerprint, "train": sets[0].fingerprint, "test": sets[1].fingerprint,
    }  # fmt: skip
    assert said["config"]["supervised_epochs"] == 1
    assert [(row["protocol"], row["part"], row["labels"]) for row in said["rows"]] == [
        ("sgd", "100%", 400), ("finetune", "10%", 40), ("finetune", "100%", 400),
    ]  # fmt: skip
    for row in said["rows"]:
        assert len(row["values"]) == 2
        assert row["seconds"] > 0
        assert row["interval95"]["low"] <= row["interval95"]["mean"] <= row["interval95"]["high"]
        tensors = load_file(Path(result.folder) / row["classifier"])
        assert tensors["head.weight"].shape == (10, 128)
    table = (Path(result.folder) / "protocols.md").read_text()
    assert len(table.splitlines()) == 5


def test_fine_tuning_as_in_v2_keeps_the_projectors_first_layer_and_makes_a_teacher(
    sets: tuple[Manifest, Manifest], run: str
) -> None:
    """From the embedding where all labels are used, as in SimCLR v2, section 3."""
    overrides = ["evaluate.protocols=[finetune_v2]", "evaluate.fractions=[0.1, 1.0]", "evaluate.supervised_epochs=1",
                 "evaluate.seeds=[0]"]  # fmt: skip
    result = evaluate(run, overrides, pictures=False)
    few, whole = (load_file(Path(result.folder) / row.classifier) for row in result.supervised)
    assert [(row.batch, row.learning_rate) for row in result.supervised] == [
        (40, pytest.approx(0.005 * math.sqrt(40))), (400, pytest.approx(0.005 * math.sqrt(400))),
    ]  # fmt: skip
    assert "layer.0.weight" in few
    assert not any(name.startswith("layer.") for name in whole)
    images = torch.randn(5, 3, 28, 28)
    for row, tensors in zip(result.supervised, (few, whole), strict=True):
        teacher = load_teacher(DistillConfig(teacher=run, classifier=f"eval/{row.classifier}"))
        h = teacher.encoder(images)
        if "layer.0.weight" in tensors:  # dense, batch norm in evaluation mode, ReLU, written out
            mean, variance = tensors["layer.1.running_mean"], tensors["layer.1.running_var"]
            h = (h @ tensors["layer.0.weight"].T - mean) / (variance + 1e-5).sqrt()
            h = torch.relu(h * tensors["layer.1.weight"] + tensors["layer.1.bias"])
        expected = h @ tensors["head.weight"].T + tensors["head.bias"]
        assert torch.allclose(teacher(images), expected, atol=1e-5)
        true = np.array([row["label"] for row in all_rows(sets[0])])
        seen = labels_of_teacher(teacher, sets[0])
        assert (seen >= 0).sum() == row.labels
        assert (seen[seen >= 0] == true[seen >= 0]).all()


def test_a_projector_without_a_hidden_layer_that_was_trained_is_refused(run: str) -> None:
    trained = load_encoder(run)
    linear = SimCLR(trained.model.encoder, make_projector(trained.width, layers=1))
    for one in (replace(trained, model=linear), replace(trained, has_projector=False)):
        with pytest.raises(ConfigError, match="no hidden one that was trained"):
            body_of(one, "finetune_v2", everything=False)
        assert body_of(one, "finetune_v2", everything=True)[1] == trained.width
        assert body_of(one, "finetune", everything=False)[1] == trained.width


def test_a_list_of_files_takes_the_place_of_fractions(
    sets: tuple[Manifest, Manifest], run: str, tmp_path: Path
) -> None:
    rows = real_rows(400)
    (tmp_path / "some.txt").write_text("\n".join(row.uri.rpartition("/")[2] for row in rows[:60]))
    result = evaluate(
        run,
        ["evaluate.protocols=[finetune]", f"evaluate.label_list={tmp_path}/some.txt", "evaluate.supervised_epochs=1",
         "evaluate.seeds=[0]"],
        pictures=False,
    )  # fmt: skip
    assert [(row.part, row.labels) for row in result.supervised] == [("some.txt", 60)]


@pytest.mark.parametrize("kind", ["sgd", "finetune"])
def test_forty_images_are_learned(sets: tuple[Manifest, Manifest], run: str, kind: Any) -> None:
    """From pixels, whose scale is known: the small rate of a small batch moves an untrained ResNet for hours."""
    images, policy = read_training_images(sets[0], Limits()).rows(torch.arange(40)), load_encoder(run).policy
    torch.manual_seed(0)
    pixels = 3 * policy.size**2
    layers = [torch.nn.Linear(pixels, pixels), torch.nn.ReLU()] if kind == "finetune" else []
    encoder = torch.nn.Sequential(torch.nn.Flatten(), *layers).eval()
    made = train_classifier(
        encoder, pixels, images, policy, Limits(), Recipe(kind, 40, 150 if kind == "sgd" else 400, 0), num_classes=10
    )
    views = read_labelled(sets[0], policy, Limits(), num_pairs=0, seed=0).views[:40]
    assert accuracy(made, views, images.labels, policy) > 0.5


def test_another_call_adds_its_rows_and_replaces_its_own(tmp_path: Path) -> None:
    about = {"step": 8, "test": "t", "manifests": {"test": "m"}, "seeds": [0], "config": {}, "version": "1"}

    def row(protocol: str, part: str, value: float) -> SupervisedRow:
        return SupervisedRow(protocol, 10, part, (value,), 1.0, 2, 4, 8, 0.1, "file")

    def written() -> list[tuple[str, str, list[float]]]:
        rows = json.loads((tmp_path / PROTOCOLS_NAME).read_text())["rows"]
        return [(one["protocol"], one["part"], one["values"]) for one in rows]

    _write(str(tmp_path), [row("finetune", "10%", 0.5), row("sgd", "100%", 0.6)], about)
    _write(str(tmp_path), [row("finetune", "1%", 0.4), row("sgd", "100%", 0.7)], about)
    assert written() == [("finetune", "10%", [0.5]), ("finetune", "1%", [0.4]), ("sgd", "100%", [0.7])]
    _write(str(tmp_path), [row("sgd", "100%", 0.7)], about | {"seeds": [5]})
    rows = json.loads((tmp_path / PROTOCOLS_NAME).read_text())["rows"]
    assert [one["seeds"] for one in rows] == [[0], [0], [5]], "each says how it was made"
    assert len((tmp_path / "protocols.md").read_text().splitlines()) == 5
    _write(str(tmp_path), [row("sgd", "100%", 0.8)], about | {"step": 9})
    assert written() == [("sgd", "100%", [0.8])], "of another checkpoint nothing is kept"
