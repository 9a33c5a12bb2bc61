"""Evaluation of a run folder made without Ray: the right rows, files that can be read, the same numbers each time."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_ray.config import Config
from simclr_ray.configure import load_config
from simclr_ray.data.decode import Limits, decode
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.shards import ImageRow
from simclr_ray.errors import ConfigError, DataError, StorageError
from simclr_ray.evaluate.encode import load_encoder, pixels, random_encoder, read_labelled
from simclr_ray.evaluate.evaluate import Evaluation, evaluate, refuse_other_classes
from simclr_ray.model.simclr import SimCLR
from simclr_ray.observe.metrics import JsonlSink, Record
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.build import build_model
from simclr_ray.train.derive import derive, policy_of
from simclr_ray.train.run import open_run
from simclr_ray.views.apply import central_view
from tests.conftest import make_data_set, real_rows

STEP = 12
PICTURES = ("curve.png", "neighbours.png", "probes.png", "views.png")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the pictures extra")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """400 labelled images to train the probes on, 200 others to test them."""
    folder = tmp_path_factory.mktemp("labelled")
    return make_data_set(folder / "train", real_rows(400)), make_data_set(folder / "test", real_rows(200, "test"))


def settings(folder: Path, sets: tuple[Manifest, Manifest], *overrides: str) -> Config:
    values: dict[str, Any] = {
        "run": {"folder": str(folder), "seed": 3},
        "data": {"train": sets[0].folder},
        "views": {"preset": "cifar", "size": 16},
        "model": {"encoder": "small", "projection_dim": 16},
        "optim": {"warmup_epochs": 0},
        "train": {"global_batch": 64, "steps": STEP},
        "evaluate": {"test": sets[1].folder, "num_labels": 300, "seeds": [0, 1]},
    }
    return load_config(values, overrides)


def make_run(config: Config, manifest: Manifest, *, steps: Sequence[int] = (STEP,)) -> str:
    """What a pretraining leaves behind, with the weights it started from."""
    run, _ = open_run(config, derive(config, manifest), manifest.fingerprint)
    model = build_model(config)
    for step in steps:
        ckpt.save(run.checkpoints, ckpt.Checkpoint(step, ckpt.model_tensors(model), {}, {"attempt": 1}))
    sink = JsonlSink(run.metrics)
    for step in range(1, 6):
        values = {"train/loss": 4.0 / step, "train/contrastive_accuracy": 0.1 * step, "data/images_per_s": 900.0}
        sink.log(Record(step=step, samples_seen=64 * step, attempt=1, wall_s=1.6e9 + step, values=values))
    sink.close()
    return run.uri


@pytest.fixture(scope="module")
def run(sets: tuple[Manifest, Manifest], tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(settings(tmp_path_factory.mktemp("runs") / "run", sets), sets[0], steps=(STEP - 4, STEP))


@pytest.fixture(scope="module")
def evaluated(run: str) -> Evaluation:
    return evaluate(run, pictures=importlib.util.find_spec("matplotlib") is not None)


@pytest.fixture
def own_run(run: str, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("eval")))


def strict(text: str) -> Any:
    """JSON as other programs read it: no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_table_has_the_baselines_before_the_trained_encoder(evaluated: Evaluation, run: str) -> None:
    assert [row.name for row in evaluated.rows] == ["raw pixels", "random encoder", "trained encoder"]
    assert (evaluated.step, evaluated.folder) == (STEP, f"{run}/eval")
    for row in evaluated.rows:
        assert row.knn_top1 is not None
        assert 0.3 < row.knn_top1 < 1, "clothes are told apart far better than by chance, in any representation"
        (summary,) = row.linear.values()
        assert list(row.linear) == ["300 labels"]
        assert len(summary.values) == 2
        assert 0.3 < summary.mean < 1
        assert row.rankme is not None
        assert row.rankme >= 1
        assert row.contrastive_accuracy is not None
        assert 0 <= row.contrastive_accuracy <= 1


def test_the_numbers_are_written_as_json_and_as_a_table(evaluated: Evaluation, sets: tuple[Manifest, Manifest]) -> None:
    folder = Path(evaluated.folder)
    numbers = strict((folder / "results.json").read_text())
    assert (numbers["step"], numbers["test"], numbers["seeds"]) == (STEP, sets[1].folder, [0, 1])
    for stored, row in zip(numbers["rows"], evaluated.rows, strict=True):
        assert stored["name"] == row.name
        assert stored["knn_top1"] == row.knn_top1
        assert stored["linear"]["300 labels"]["mean"] == row.linear["300 labels"].mean
    lines = (folder / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(evaluated.rows)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row.name for row in evaluated.rows]


def test_one_seed_has_no_spread_and_the_numbers_are_json_still(own_run: Path) -> None:
    result = evaluate(str(own_run), ["evaluate.seeds=[0]", "evaluate.num_labels=null"], pictures=False)
    stored = strict((own_run / "eval" / "results.json").read_text())
    assert stored["rows"][0]["linear"]["400 labels"]["spread"] is None
    assert result.rows[0].linear["400 labels"].values == (stored["rows"][0]["linear"]["400 labels"]["mean"],)
    assert sorted(path.name for path in (own_run / "eval").iterdir()) == ["results.json", "table.md"]


@needs_matplotlib
def test_four_pictures_are_drawn(evaluated: Evaluation) -> None:
    folder = Path(evaluated.folder)
    assert sorted(path.name for path in folder.glob("*.png")) == list(PICTURES)
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 100
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10, "something is drawn"


def test_two_evaluations_of_a_run_are_equal(evaluated: Evaluation, own_run: Path) -> None:
    torch.manual_seed(123456)
    again = evaluate(str(own_run), pictures=False)
    assert again.rows == evaluated.rows
    stored = [strict((Path(folder) / "results.json").read_text()) for folder in (evaluated.folder, own_run / "eval")]
    assert all(min(one.pop("cost_s").values()) > 0 for one in stored)
    assert stored[0] == stored[1]


def test_overrides_reach_the_probes_and_nothing_else(own_run: Path) -> None:
    result = evaluate(
        str(own_run), ["evaluate.num_labels=100", "evaluate.seeds=[7]", "evaluate.knn_k=3"], pictures=False
    )
    assert list(result.rows[0].linear) == ["100 labels"]
    stored = strict((own_run / "eval" / "results.json").read_text())
    assert (stored["knn_k"], stored["seeds"]) == (3, [7])


@pytest.mark.parametrize("override", ["views.size=32", "run.seed=4", " train.steps=9", "evaluate=3", "evaluat.knn_k=1"])
def test_only_the_evaluate_section_may_be_overridden(run: str, override: str) -> None:
    with pytest.raises(ConfigError, match=r"only evaluate\.\*") as caught:
        evaluate(run, ["evaluate.knn_k=5", override])
    assert override.strip() in str(caught.value)
    assert "evaluate.knn_k" not in str(caught.value).replace(override, "")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.knn_k=0", "evaluate.knn_k"),
        ("evaluate.knn=5", "did you mean evaluate.knn_k"),
        ("evaluate.knn_k=401", "1 to 400"),
        ("evaluate.test=null", "no test set is named"),
    ],
)
def test_evaluate_settings_that_cannot_work_are_a_sentence(own_run: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate(str(own_run), [override], pictures=False)
    assert not (own_run / "eval").exists()


def test_a_test_set_that_is_not_there_is_a_sentence(own_run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set here") as caught:
        evaluate(str(own_run), [f"evaluate.test={tmp_path}/absent"])
    assert f"{tmp_path}/absent" in str(caught.value)


@pytest.mark.parametrize("which", ["train", "test"])
def test_images_without_labels_are_refused(own_run: Path, tmp_path: Path, which: str) -> None:
    rows = [replace(row, label=None) if i == 50 else row for i, row in enumerate(real_rows(80))]
    unlabelled = make_data_set(tmp_path / "unlabelled", rows)
    with pytest.raises(DataError, match="has no labels") as caught:
        evaluate(str(own_run), [f"evaluate.{which}={unlabelled.folder}"], pictures=False)
    assert unlabelled.folder in str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for call in (evaluate, load_encoder):
        with pytest.raises(ConfigError, match="no run here"):
            call(str(tmp_path))


def test_a_run_without_checkpoint_is_refused(sets: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    run = make_run(settings(tmp_path / "run", sets), sets[0], steps=())
    for call in (evaluate, load_encoder):
        with pytest.raises(StorageError, match="no checkpoint yet"):
            call(run)
    with pytest.raises(StorageError, match=r"no valid checkpoint of step 3.*got none"):
        load_encoder(run, step=3)


@needs_matplotlib
def test_a_run_without_its_metrics_file_is_a_sentence_after_the_numbers(own_run: Path) -> None:
    (own_run / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be drawn"):
        evaluate(str(own_run), ["evaluate.num_labels=50", "evaluate.seeds=[0]"])
    assert (own_run / "eval" / "results.json").exists(), "the numbers need no metrics"


def test_an_encoder_embeds_images_of_any_size(run: str) -> None:
    trained = load_encoder(run)
    assert not trained.model.training
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((2, 2), (16, 16), (40, 17), (9, 300))]
    h = trained.embed(images)
    assert h.shape == (4, build_model(settings(Path("x"), unused())).encoder.embedding_dim)
    assert h.dtype == torch.float32
    assert h.isfinite().all()
    for i, image in enumerate(images):
        torch.testing.assert_close(trained.embed([image])[0], h[i], rtol=1e-4, atol=1e-5)


def unused() -> tuple[Manifest, Manifest]:
    return Manifest("/unused", ()), Manifest("/unused", ())


def test_any_step_with_a_checkpoint_can_be_loaded(run: str) -> None:
    assert [load_encoder(run).step, load_encoder(run, step=STEP - 4).step] == [STEP, STEP - 4]
    with pytest.raises(StorageError, match="no valid checkpoint of step 5") as caught:
        load_encoder(run, step=5)
    assert f"{STEP - 4}, {STEP}" in str(caught.value)


def test_loaded_weights_are_those_of_the_checkpoint(run: str, sets: tuple[Manifest, Manifest]) -> None:
    expected = build_model(settings(Path(run), sets)).state_dict()
    loaded = load_encoder(run).model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def views_of(manifest: Manifest, config: Config, count: int) -> np.ndarray:
    policy = policy_of(config.views)
    return read_labelled(manifest, policy, Limits(), num_pairs=1, seed=0).views[:count]


def statistics(model: SimCLR) -> list[torch.Tensor]:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    return [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]


@pytest.mark.parametrize("count", [400, 257], ids=["two batches", "a rest of one image"])
def test_a_random_encoder_has_the_statistics_of_real_images(sets: tuple[Manifest, Manifest], count: int) -> None:
    config = settings(Path("unused"), sets)
    model = random_encoder(config, views_of(sets[0], config, count), policy_of(config.views))
    assert not model.training
    for value in statistics(model):
        assert value.isfinite().all()
        assert not torch.equal(value, torch.zeros_like(value)), "a mean of zero is the default"
        assert not torch.equal(value, torch.ones_like(value)), "a variance of one is the default"
    weights, initial = dict(model.named_parameters()), dict(build_model(config).named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in initial.items()), "nothing was taught"


def test_a_random_encoder_depends_on_the_runs_seed_alone(sets: tuple[Manifest, Manifest]) -> None:
    def made(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        config = settings(Path("unused"), sets, f"run.seed={seed}")
        torch.manual_seed(global_seed)
        return random_encoder(config, views_of(sets[0], config, 64), policy_of(config.views)).state_dict()

    one, same, other = made(3, 0), made(3, 1), made(4, 0)
    assert all(torch.equal(one[name], value) for name, value in same.items())
    assert not all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.parametrize(("size", "side"), [(16, 16), (32, 32), (48, 32)])
@pytest.mark.parametrize("colour", [False, True])
def test_pixels_are_small_gray_where_they_can_be_and_in_0_to_1(size: int, side: int, colour: bool) -> None:
    policy = policy_of(load_config({"views": {"preset": "cifar", "size": size}}).views)
    levels = np.random.default_rng(1).integers(0, 256, (5, size, size, 3 if colour else 1), dtype=np.uint8)
    views = np.broadcast_to(levels, (5, size, size, 3)).copy()
    features = pixels(views, policy)
    assert features.shape == (5, side * side * (3 if colour else 1))
    assert 0 <= float(features.min()) < 0.2
    assert 0.8 < float(features.max()) <= 1
    if size == side:
        assert torch.equal(features, torch.from_numpy(levels).flatten(1).float() / 255)


def test_one_coloured_pixel_makes_a_set_coloured() -> None:
    policy = policy_of(load_config({"views": {"preset": "cifar", "size": 16}}).views)
    views = np.full((3, 16, 16, 3), 7, dtype=np.uint8)
    assert pixels(views, policy).shape == (3, 256)
    views[2, 5, 5, 1] = 8
    assert pixels(views, policy).shape == (3, 768)


def test_read_labelled_keeps_images_and_labels_together(tmp_path: Path) -> None:
    """Broken images fall out with their labels; pairs are of the first images that are left."""
    rows = [ImageRow(b"broken", 9, row.uri) if i % 7 == 3 else row for i, row in enumerate(real_rows(120))]
    policy = policy_of(load_config({"views": {"preset": "cifar", "size": 16}}).views)
    found = read_labelled(make_data_set(tmp_path, rows), policy, Limits(), num_pairs=30, seed=0)
    good = [row for row in rows if row.image != b"broken"]
    assert found.rejected == len(rows) - len(good) == 17
    assert found.labels.tolist() == [row.label for row in good]
    assert (found.views == central_view([decoded(row) for row in good], policy)).all()
    assert found.pairs.shape == (30, 2, 16, 16, 3)
    assert (found.pairs[:, 0] != found.pairs[:, 1]).any(axis=(1, 2, 3)).mean() > 0.9


def decoded(row: ImageRow) -> np.ndarray:
    image = decode(row.image, Limits())
    assert isinstance(image, np.ndarray)
    return image


def test_a_set_in_which_nothing_decodes_is_a_sentence(own_run: Path, tmp_path: Path) -> None:
    hollow = make_data_set(tmp_path / "hollow", [ImageRow(b"", 1, str(i)) for i in range(40)])
    with pytest.raises(DataError, match="no image of the data set decodes"):
        evaluate(str(own_run), [f"evaluate.test={hollow.folder}"], pictures=False)


@needs_matplotlib
def test_a_handful_of_test_images_is_enough(own_run: Path, tmp_path: Path) -> None:
    few = make_data_set(tmp_path / "few", real_rows(3, "test"))
    evaluate(str(own_run), [f"evaluate.test={few.folder}", "evaluate.seeds=[0]", "evaluate.num_labels=50"])
    strict((own_run / "eval" / "results.json").read_text())
    assert len(list((own_run / "eval").glob("*.png"))) == len(PICTURES)


def test_one_test_image_is_too_few(own_run: Path, tmp_path: Path) -> None:
    one = make_data_set(tmp_path / "one", real_rows(1, "test"))
    with pytest.raises(DataError, match="pairs of test images") as caught:
        evaluate(str(own_run), [f"evaluate.test={one.folder}"])
    assert one.folder in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "differ"),
    [
        (("cat", "dog", "owl"), ("cat", "owl"), "label 1 is 'dog' in the first and 'owl' in the second"),
        (("cat", "dog"), ("ant", "cat", "dog"), "label 0 is 'cat' in the first and 'ant' in the second"),
        (("0", "1", "2"), ("0", "1"), None),  # numbers: a test set without the last class
        (("cat", "dog"), (), None),  # of one the names are not known
    ],
)
def test_labels_that_mean_another_class_in_the_test_set_are_refused(
    sets: tuple[Manifest, Manifest], train: tuple[str, ...], test: tuple[str, ...], differ: str | None
) -> None:
    first, second = (replace(data, classes=classes) for data, classes in zip(sets, (train, test), strict=True))
    if differ is None:
        refuse_other_classes(first, second)
        return
    with pytest.raises(DataError, match="number their classes differently") as error:
        refuse_other_classes(first, second)
    assert error.value.got == differ
