"""Faults of whole nodes, on a cluster of three raylets: one is lost, one is taken away with notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simclr_ray.data.manifest import Manifest
from tests.faults import commands
from tests.faults.commands import STEPS, losses, recipe

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def on_two_nodes(file: Path, event: str, after_step: int) -> tuple[dict[str, Any], str]:
    """What happened, and all that the driver's console said."""
    environment = os.environ | {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20", "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3",
    }  # fmt: skip
    program = [sys.executable, "-m", "tests.faults.two_nodes", str(file), event, str(after_step)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray may have printed more after it
    return json.loads(told[-1]), done.stdout


def twin(folder: Path, data_set: Manifest, steps: int) -> dict[int, float]:
    code, output = commands.run(recipe(folder, data_set, train__steps=steps))
    assert code == 0, output
    return losses(folder)


def test_row_35_a_lost_node_costs_a_restart_with_fewer_workers_and_no_sample(
    data_set: Manifest, tmp_path: Path
) -> None:
    undisturbed = twin(tmp_path / "twin", data_set, STEPS)
    folder = tmp_path / "run"
    file = recipe(folder, data_set, cluster__workers=2, cluster__min_workers=1)
    happened, output = on_two_nodes(file, "kill", 12)
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-3)
    assert json.loads((folder / "run.json").read_text())["attempts"] >= 2
    assert "continuing from the checkpoint of step 10" in output
    assert happened["at_step"] >= 12


def test_row_36_a_notice_brings_a_checkpoint_before_the_node_goes_and_costs_no_failure(
    data_set: Manifest, tmp_path: Path
) -> None:
    """With no failure allowed: the loss of a node with notice is not counted as one."""
    undisturbed = twin(tmp_path / "twin", data_set, 200)
    folder = tmp_path / "run"
    file = recipe(
        folder, data_set, cluster__workers=2, cluster__min_workers=1, cluster__max_failures=0, train__steps=200,
    )  # fmt: skip
    happened, output = on_two_nodes(file, "drain", 3)
    assert happened["saved"], "an extra checkpoint, at a step of no interval"
    assert "about to go; saving a checkpoint" in output
    found = losses(folder)
    assert sorted(found) == list(range(1, 201))
    assert found == pytest.approx(undisturbed, rel=5e-3)
