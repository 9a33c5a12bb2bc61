"""Who proposes, who ends, and how many side by side."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from ray import tune

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError
from simclr_ray.search.propose import OBJECTIVE, SECOND, Inside, domains, scheduler, searcher, side_by_side
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


def random_proposals(seed: int) -> list[dict[str, Any]]:
    asked = spec(seed=seed)
    search: Any = searcher(asked, 1)
    from ray.tune.experiment import Experiment

    class Nothing(tune.Trainable):  # type: ignore[misc]
        pass

    search.add_configurations([Experiment("x", Nothing, config=domains(asked), num_samples=asked.num_trials)])
    out = []
    while (trial := search.next_trial()) is not None:
        out.append(trial.config)
        search.on_trial_complete(trial.trial_id, {})
    return out


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
    assert names == {"none": "FIFOScheduler", "asha": "AsyncHyperBandScheduler", "median": "MedianStoppingRule"}


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
