"""Planes on a real cluster of labelled nodes: who trains, and who makes views."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simclr_ray.data.manifest import Manifest
from tests.conftest import ROOT
from tests.faults.commands import recipe

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]


def ran(file: Path) -> dict[str, Any]:
    """Where tasks and workers ran, by the role of the node."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.two_planes", str(file)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_views_are_made_on_data_nodes_alone_and_training_on_train_nodes_alone(
    data_set: Manifest, tmp_path: Path
) -> None:
    labels = {"cluster__train_labels": {"simclr-role": "train"}, "cluster__data_labels": {"simclr-role": "data"}}
    told = ran(recipe(tmp_path / "run", data_set, train__steps=20, cluster__workers=1, **labels))
    assert set(told["workers"]) == {"train"}, told
    assert set(told["stream"]) == {"data"}, told
    assert any("Repartition" in name for name in told["names"]), told  # the last of the stream's tasks counts too


def test_without_labels_views_are_made_where_there_are_cpus(data_set: Manifest, tmp_path: Path) -> None:
    told = ran(recipe(tmp_path / "run", data_set, train__steps=20, cluster__workers=1))
    assert "train" in told["stream"], told  # the same cluster: what keeps the stream off it above is the labels
