"""Spaces: what is refused, how it is said, and that the shipped ones can be searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.errors import ConfigError
from simclr_ray.search.space import FREE_FIELDS, SearchSpec, check_space, load_space, why_not, with_settings
from simclr_ray.search.trial import Rungs
from simclr_ray.train.derive import derive
from tests.conftest import FASHION, ROOT, small_run

SPACES = sorted((ROOT / "jobs" / "spaces").glob("*.yaml"))
RECIPES = sorted((ROOT / "jobs").glob("*.yaml"))


def spec(**changes: Any) -> dict[str, Any]:
    space = {"loss.temperature": {"loguniform": [0.05, 1.0]}}
    return {"space": space, "trials": 4, "objective": {"every": 5}} | changes


def refusal(values: dict[str, Any], tmp_path: Path, manifest: Manifest, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_space(load_space(values), small_run(tmp_path, manifest, train__epochs=2, **changes), manifest)
    return str(caught.value)


@pytest.mark.parametrize("space", SPACES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_spaces_can_be_searched_from_shipped_recipes(space: Path, recipe: Path) -> None:
    """Every end and every choice of them, on a real data set."""
    manifest = read_manifest(str(FASHION / "train"))
    config = load_config(recipe, [f"data.train={manifest.folder}"])
    checked = load_space(space)
    check_space(checked, config, manifest)
    total = derive(config, manifest).total_steps
    assert Rungs.of(config, config, checked.objective.every, total).steps[-1] == total


def test_there_are_spaces_and_none_is_taken_for_a_configuration() -> None:
    assert [path.stem for path in SPACES] == ["augmentation", "full", "temperature"]
    assert not set(SPACES) & set(RECIPES)


def test_a_second_objective_needs_a_searcher_that_takes_two(data_set: Manifest, tmp_path: Path) -> None:
    two = {"every": 5, "measure": "rankme", "also": "alignment"}
    assert load_space(spec(searcher="tpe", objective=two)).objective.also == "alignment"
    with pytest.raises(ConfigError, match="second objective for searcher tpe, not for random"):
        load_space(spec(objective=two))
    with pytest.raises(ConfigError, match="are both rankme"):
        load_space(spec(searcher="tpe", objective=two | {"also": "rankme"}))
    labelled = spec(searcher="tpe", objective=two | {"also": "knn_top1"})
    unlabelled = {"evaluate__train": None, "evaluate__test": None}
    assert "objective.also: knn_top1 needs labels" in refusal(labelled, tmp_path, data_set, **unlabelled)


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("model.projector_layers", {"uniform": [1, 3]}, "model.projector_layers: got 1.6"),
        ("train.global_batch", {"loguniform": [32, 64]}, "train.global_batch: got 42.1"),
        ("train.global_batch", {"int": [32, 64]}, "tried; list those that can be, as choice"),
        ("train.global_batch", {"quniform": [32, 64, 8]}, "(as 2 of 5 tried"),
    ],
)
def test_values_between_the_ends_are_tried_too(
    key: str, values: dict[str, Any], words: str, data_set: Manifest, tmp_path: Path
) -> None:
    """Units have 16 images, and batches are whole units."""
    assert words in refusal(spec(space={key: values}), tmp_path, data_set)


def test_ranges_whose_every_value_can_be_are_taken(data_set: Manifest, tmp_path: Path) -> None:
    space = {"train.global_batch": {"quniform": [32, 64, 16]}, "model.projector_layers": {"int": [1, 4]},
             "model.projector_hidden": {"logint": [16, 4096]}}  # fmt: skip
    check_space(load_space(spec(space=space)), small_run(tmp_path, data_set, train__epochs=2), data_set)
    with pytest.raises(ConfigError, match=r"ends that are multiples of its step, 0\.25"):
        load_space(spec(space={"loss.temperature": {"quniform": [0.1, 1.0, 0.25]}}))


def test_the_loss_is_refused_as_a_second_objective_too() -> None:
    for objective in ({"every": 5, "also": "loss"}, {"every": 5, "measure": "train/loss", "also": "contrastive"}):
        with pytest.raises(ConfigError) as caught:
            load_space(spec(searcher="tpe", objective=objective))
        assert str(caught.value).count("so the best loss is that of the easiest task") == len(objective) - 1


def test_a_mistyped_key_gets_a_suggestion_and_all_mistakes_come_at_once(data_set: Manifest, tmp_path: Path) -> None:
    space = {
        "loss.temprature": {"uniform": [0.1, 1]},
        "views.strength": {"uniform": [0, 5]},
        "model.encoder": {"choice": ["small", "huge"]},
    }
    text = refusal(spec(space=space), tmp_path, data_set)
    assert text.startswith("3 mistakes in the space:")
    assert "loss.temprature: unknown key (did you mean loss.temperature?)" in text
    assert "views.strength: got 5.0, expected less than or equal to 2" in text
    assert "model.encoder: got 'huge'" in text


def test_both_ends_and_every_choice_are_tried_on_the_data_set(data_set: Manifest, tmp_path: Path) -> None:
    space = {"train.global_batch": {"choice": [64, 40, 6400]}}
    text = refusal(spec(space=space), tmp_path, data_set)
    assert "got 40" in text
    assert "6400" in text
    space = {"loss.temperature": {"uniform": [0, 1]}}
    assert "greater than 0" in refusal(spec(space=space), tmp_path, data_set)


@pytest.mark.parametrize(
    "key",
    ["run.seed", "run.folder", "data.train", "data.max_pixels", "storage.region", "cluster.workers",
     "evaluate.knn_k", "train.steps", "train.epochs", "train.log_every", "views.where", "loss.kernel", "loss"],
)  # fmt: skip
def test_keys_that_cannot_be_searched_are_refused_with_the_reason(key: str) -> None:
    assert why_not(key)


def test_keys_that_can_be_searched_are_not() -> None:
    for key in ("loss.temperature", "views.strength", "train.global_batch", "optim.rule", "model.projection_dim"):
        assert why_not(key) is None


@pytest.mark.parametrize("measure", ["train/loss", "loss", "train/contrastive_accuracy"])
def test_the_loss_is_refused_as_an_objective_with_the_reason(measure: str) -> None:
    with pytest.raises(ConfigError, match=r"depends on the temperature.*batch.*views"):
        load_space(spec(objective={"every": 5, "measure": measure}))


def test_a_labelled_measure_without_labels_is_refused_before_ray(data_set: Manifest, tmp_path: Path) -> None:
    values = spec(objective={"every": 5, "measure": "knn_top1"})
    assert "needs labels" in refusal(values, tmp_path, data_set)
    config = small_run(tmp_path, data_set, train__epochs=2, evaluate__train=data_set.folder)
    check_space(load_space(values), config, data_set)


def test_batches_cannot_be_searched_by_steps(data_set: Manifest, tmp_path: Path) -> None:
    space = {"train.global_batch": {"choice": [64, 128]}}
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        check_space(load_space(spec(space=space)), small_run(tmp_path, data_set, train__steps=10), data_set)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"searcher": "grid"}, "needs the kind grid"),
        ({"space": {"loss.temperature": {"grid": [0.1, 1]}}}, "use choice instead of grid"),
        ({"trials": None}, "needs a number of trials"),
        ({"space": {"a": {"grid": [1, 2]}}, "searcher": "grid"}, "leave trials out"),
        ({"space": {"model.projection_dim": {"int": [8, 16]}}, "scheduler": "pbt"}, "in the middle of a run"),
        ({"scheduler": "pbt", "searcher": "tpe"}, "proposes values itself"),
        ({"space": {"a": {"uniform": [2, 1]}}}, "the smaller one"),
        ({"space": {"a": {"uniform": [1, 2], "int": [1, 2]}}}, "exactly one"),
        ({"space": {}}, "at least 1"),
        ({"objective": {"every": 0}}, "objective.every: got 0"),
        ({"objectve": 1}, "did you mean objective?"),
        ({"reduction": 1.0}, "reduction"),
    ],
)
def test_fields_that_do_not_fit_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_space(spec(**changes))
    assert words in str(caught.value)


def test_a_grid_has_as_many_trials_as_combinations() -> None:
    space = {"loss.temperature": {"grid": [0.1, 0.2, 0.5]}, "views.strength": {"grid": [0.0, 1.0]}}
    assert load_space({"space": space, "searcher": "grid", "objective": {"every": 5}}).num_trials == 6


def test_a_space_survives_yaml(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(spec(scheduler="asha", grace=2)))
    assert load_space(file) == load_space(spec(scheduler="asha", grace=2))


def test_values_outside_are_brought_back() -> None:
    space = load_space(spec(space={
        "a": {"uniform": [0.1, 1.0]}, "b": {"int": [1, 4]}, "c": {"choice": ["x", "y"]},
    })).space  # fmt: skip
    assert [space["a"].clamped(v) for v in (0.0, 0.5, 1.2)] == [0.1, 0.5, 1.0]
    assert [space["b"].clamped(v) for v in (0, 2.6, 5)] == [1, 3, 4]
    assert [space["c"].clamped(v) for v in ("y", "z")] == ["y", "x"]


def test_free_fields_are_fields() -> None:
    for name in FREE_FIELDS:
        model: Any = SearchSpec
        for part in name.split("."):
            assert part in model.model_fields
            model = model.model_fields[part].annotation


def test_trials_of_other_batches_are_scored_after_as_many_images(data_set: Manifest, tmp_path: Path) -> None:
    config = small_run(tmp_path, data_set, train__epochs=10)
    double = with_settings(config, {"train.global_batch": 128})
    assert Rungs.of(config, config, 10, 62).steps == [10, 20, 30, 40, 50, 60, 62]
    assert Rungs.of(config, double, 10, 31).steps == [5, 10, 15, 20, 25, 30, 31]
    assert Rungs.of(config, config, 100, 62).steps == [62]
    assert Rungs(10, 20).due_after(20) is None
    assert Rungs(10, 20).due_after(13) == 20
