"""Who proposes, who ends, and how many side by side."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle, tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.search import SearchAlgorithm
from ray.tune.search.search_generator import SearchGenerator

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError
from simclr_ray.search.propose import (
    OBJECTIVE,
    SECOND,
    TIME,
    Inside,
    domains,
    limited,
    scheduler,
    searcher,
    side_by_side,
)
from simclr_ray.search.space import SearchSpec, load_space


def spec(**changes: Any) -> SearchSpec:
    space = {
        "loss.temperature": {"loguniform": [0.05, 1.0]},
        "views.strength": {"quniform": [0.0, 1.5, 0.25]},
        "model.projector_layers": {"int": [1, 3]},
        "optim.rule": {"choice": ["linear", "sqrt"]},
    }
    return load_space({"space": space, "trials": 8, "objective": {"every": 5}} | changes)


def proposals(seed: int, results: list[float]) -> list[dict[str, Any]]:
    """What TPE asks for while these results come in."""
    asked = spec(searcher="tpe", seed=seed)
    return asked_for(asked, [{OBJECTIVE: result} for result in results])


def asked_for(asked: SearchSpec, results: list[dict[str, float]]) -> list[dict[str, Any]]:
    search: Any = searcher(asked)
    search.set_search_properties(None, None, domains(asked))
    out = []
    with limited(1):
        for number, result in enumerate(results):
            out.append(search.suggest(str(number)))
            search.on_trial_complete(str(number), result)
    return out


def test_the_same_seed_and_results_give_the_same_proposals() -> None:
    pytest.importorskip("optuna")
    results = [(7 * number) % 11 / 11 for number in range(16)]
    first = proposals(3, results)
    assert first == proposals(3, results)
    assert first != proposals(4, results)
    assert first[:11] != proposals(3, [1 - one for one in results])[:11]  # past its 10 random ones it learns
    for one in first:
        assert 0.05 <= one["loss.temperature"] <= 1
        assert one["views.strength"] in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
        assert one["model.projector_layers"] in (1, 2, 3)
        assert one["optim.rule"] in ("linear", "sqrt")


def test_a_second_objective_is_proposed_for_too() -> None:
    """TPE over the Pareto front: with the first objective equal everywhere, only the second can teach anything."""
    pytest.importorskip("optuna")
    asked = spec(searcher="tpe", seed=3, objective={"every": 5, "measure": "rankme", "also": "alignment"})
    draws = random.Random(0)
    seconds = [draws.random() for _ in range(16)]
    rising = [{OBJECTIVE: 0.5, SECOND: value} for value in seconds]
    falling = [{OBJECTIVE: 0.5, SECOND: 1 - value} for value in seconds]
    assert asked_for(asked, rising) == asked_for(asked, rising)
    assert asked_for(asked, rising)[:10] == asked_for(asked, falling)[:10]
    assert asked_for(asked, rising) != asked_for(asked, falling)


class Nothing(tune.Trainable):  # type: ignore[misc]
    """Never trained."""


def generator(asked: SearchSpec) -> Any:
    """As Tune makes it of a searcher."""
    found = searcher(asked)
    search: Any = found if isinstance(found, SearchAlgorithm) else SearchGenerator(found)
    search.set_search_properties(None, None, domains(asked))
    search.add_configurations([Experiment("x", Nothing, config=domains(asked), num_samples=asked.num_trials)])
    return search


def random_proposals(seed: int) -> list[dict[str, Any]]:
    search = generator(spec(seed=seed))
    out = []
    with limited(1):
        while (trial := search.next_trial()) is not None:
            out.append(trial.config)
            search.on_trial_complete(trial.trial_id, {})
    return out


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_a_continued_search_proposes_no_more_at_a_time_than_it_has_room_for_now(name: str, tmp_path: Path) -> None:
    """Whatever limit the searcher had when it was kept; trials that were under way count."""
    if name == "tpe":
        pytest.importorskip("optuna")
    asked = spec(searcher=name)
    first = generator(asked)
    with limited(3):
        begun = [first.next_trial() for _ in range(3)]
        assert all(begun)
        assert first.next_trial() is None
    first.on_trial_complete(begun[0].trial_id, {OBJECTIVE: 0.5})
    first.save_to_dir(str(tmp_path), "x")
    again = generator(asked)
    again.restore_from_dir(str(tmp_path))
    with limited(1):
        assert again.next_trial() is None
        again.on_trial_complete(begun[1].trial_id, {OBJECTIVE: 0.5})
        assert again.next_trial() is None
        again.on_trial_complete(begun[2].trial_id, {OBJECTIVE: 0.5})
        assert again.next_trial() is not None
        assert again.next_trial() is None


def trial_of(name: str, scores: int) -> Trial:
    """As Tune brings it back after so many scores."""
    trial = Trial("Nothing", trial_id=name)
    trial.run_metadata.last_result = {TIME: scores} if scores else {}
    return trial


@pytest.mark.parametrize("name", ["asha", "median"])
def test_the_scheduler_of_a_continued_search_remembers_the_trials_before(name: str) -> None:
    tune.register_trainable("Nothing", Nothing)
    asked = spec(scheduler=name, reduction=2.0)
    scored = {"good": [0.7, 0.8, 0.9], "fine": [0.6, 0.7, 0.8], "bad": [0.1]}
    nobody: Any = SimpleNamespace(get_live_trials=list)

    def decisions(made: Any, new: str) -> list[str]:
        newcomer = trial_of(new, 0)
        made.on_trial_add(nobody, newcomer)
        return [made.on_trial_result(nobody, newcomer, {TIME: 1, OBJECTIVE: 0.2}) for _ in range(1)]

    undisturbed: Any = scheduler(asked, 4)
    for other, scores in scored.items():
        trial = trial_of(other, 0)
        undisturbed.on_trial_add(nobody, trial)
        for time, value in enumerate(scores, 1):
            undisturbed.on_trial_result(nobody, trial, {TIME: time, OBJECTIVE: value})
    continued: Any = cloudpickle.loads(cloudpickle.dumps(scheduler(asked, 4, lambda one: scored.get(one, ()))))
    for other, scores in scored.items():
        continued.on_trial_add(nobody, trial_of(other, len(scores)))
    forgetful: Any = scheduler(asked, 4)
    for other, scores in scored.items():
        forgetful.on_trial_add(nobody, trial_of(other, len(scores)))
    assert decisions(undisturbed, "new") == decisions(continued, "new") == ["STOP"]
    assert decisions(forgetful, "new") == ["CONTINUE"]


def test_the_same_seed_draws_the_same_values() -> None:
    first = random_proposals(5)
    assert len(first) == 8
    assert first == random_proposals(5)
    assert first != random_proposals(6)


def test_population_based_training_stays_inside_the_space() -> None:
    space = load_space({
        "space": {"loss.temperature": {"uniform": [0.1, 0.5]}, "views.strength": {"choice": [0.0, 1.0]}},
        "trials": 4, "scheduler": "pbt", "objective": {"every": 5},
    })  # fmt: skip
    inside = Inside(dict(space.space))
    assert inside({"loss.temperature": 0.6, "views.strength": 1.0}) == {"loss.temperature": 0.5, "views.strength": 1.0}
    assert scheduler(space, 10).__class__.__name__ == "PopulationBasedTraining"


def test_each_scheduler_is_tunes() -> None:
    names = {kind: type(scheduler(spec(scheduler=kind), 5)).__name__ for kind in ("none", "asha", "median")}
    assert names == {"none": "FIFOScheduler", "asha": "Halving", "median": "Median"}


@pytest.mark.parametrize(
    ("cluster", "resources", "asked", "expected"),
    [
        ({"workers": 1}, {"CPU": 2.0}, None, 1),
        ({"workers": 1}, {"CPU": 3.0}, None, 2),
        ({"workers": 1}, {"CPU": 100.0}, None, 8),  # no more than there are trials
        ({"workers": 1}, {"CPU": 3.0}, 5, 2),  # more would take the streams' CPU
        ({"workers": 1}, {"CPU": 9.0}, 3, 3),
        ({"workers": 2, "cpus_per_worker": 2, "data_cpus": 4}, {"CPU": 12.0}, None, 2),
        ({"workers": 1, "use_gpu": True}, {"CPU": 9.0, "GPU": 2.0}, None, 2),
        ({"workers": 1, "cpus_per_worker": 0.1, "data_cpus": 1}, {"CPU": 1.3}, None, 3),  # 0.3 / 0.1 is below 3
        ({}, {"CPU": 9.0, "GPU": 4.0}, None, 1),  # null workers: one per GPU
    ],
)
def test_as_many_trials_as_have_room(
    cluster: dict[str, Any], resources: dict[str, float], asked: int | None, expected: int
) -> None:
    count, why = side_by_side(spec(max_concurrent=asked), ClusterConfig(**cluster), resources, may_grow=False)
    assert count == expected
    assert f"{resources['CPU']:g} CPUs" in why


def test_a_cluster_that_may_grow_is_taken_at_the_users_word() -> None:
    count, why = side_by_side(spec(max_concurrent=5), ClusterConfig(workers=1), {}, may_grow=True)
    assert count == 5
    assert "room for 0: the others wait for nodes" in why


def test_a_cluster_without_room_for_one_is_refused() -> None:
    words = re.escape("2 workers of 1 CPU, and 1 CPU for the streams")
    with pytest.raises(ClusterError, match=words):
        side_by_side(spec(), ClusterConfig(workers=2), {"CPU": 2.0}, may_grow=False)
    with pytest.raises(ClusterError, match=r"set cluster\.workers, and max_concurrent"):
        side_by_side(spec(), ClusterConfig(workers=2), {}, may_grow=True)
