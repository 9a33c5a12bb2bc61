"""A trial by itself, without Tune: what it does about the folder of its training."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray
from ray import tune

from simclr_ray.data.manifest import Manifest
from simclr_ray.search.probe import read_probe
from simclr_ray.search.space import ObjectiveSpec
from simclr_ray.search.trial import Trial, TrialPlan
from simclr_ray.train.derive import limits_of, policy_of
from simclr_ray.train.lock import LOCK_NAME, STALE_S, Holder
from tests.conftest import small_run

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_a_trial_waits_for_the_lock_of_its_life_on_a_host_that_was_lost(
    local_ray: None, data_set: Manifest, tmp_path: Path
) -> None:
    """Tune begins a trial again at once elsewhere; the lock of before still looks alive, and nobody can release it."""
    config = small_run(tmp_path / "unused", data_set, train__steps=4)
    found = read_probe(data_set, policy_of(config.views), limits_of(config.data), images=32, voters=0, views=2, seed=0)
    plan = TrialPlan(
        str(tmp_path), config, ObjectiveSpec(every=4), "rankme", stall_s=200.0, keep=3, probe=ray.put(found),
        cases=[("one", {"loss.temperature": 0.2})],
    )  # fmt: skip
    (tmp_path / "one" / "gen-1").mkdir(parents=True)
    lock = tmp_path / "one" / "gen-1" / LOCK_NAME
    lock.write_bytes(Holder("token", "elsewhere", "boot", 1, 5, time.time() - STALE_S + 8).encode())
    trial = tune.with_parameters(Trial, plan=plan)({"case": 0})
    try:
        result = trial.train()
    finally:
        trial.stop()
    assert result["done"]
    assert result["step"] == 4
    assert result["rankme"] > 1, result
    assert not lock.exists()
