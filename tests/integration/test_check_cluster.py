"""`simclr-ray check` of a real cluster that is given: in seconds, with its guard, its versions and its disks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_ray.data.manifest import Manifest
from tests.conftest import ROOT
from tests.faults.commands import recipe
from tests.servers.ray_head import clean_environment, has_dashboard, ray_head

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not has_dashboard(), reason="no dashboard: ray[default] is not installed"),
]


def test_a_cluster_that_is_given_is_looked_at_and_what_it_has_not_is_said(data_set: Manifest, tmp_path: Path) -> None:
    with ray_head(tmp_path, token="0123456789abcdef0123456789abcdef", cpus=3, labels={"simclr-role": "data"}) as head:
        good = recipe(tmp_path / "good", data_set, cluster__address=head.gcs, cluster__workers=1)
        much = recipe(tmp_path / "much", data_set, cluster__address=head.gcs, cluster__workers=4)
        nowhere = recipe(
            tmp_path / "nowhere", data_set, cluster__address=head.gcs, cluster__data_labels={"simclr-role": "data"},
            cluster__train_labels={"simclr-role": "train"},
        )  # fmt: skip
        commands = json.dumps([["check", str(file)] for file in (good, much, nowhere)])
        done = subprocess.run(
            [sys.executable, "-m", "tests.servers.calls", commands],
            env=clean_environment() | dict(head.environment), cwd=ROOT, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (code, said, err), (too_much, why, _), (unlabelled, _, which) = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, err
    assert "cluster: 3 CPUs (3 free)" in said
    assert "asked: 2 CPUs and 0 GPUs for 1 worker and the stream; free now" in said
    assert "versions: 1 of 1 nodes have those of this machine" in said
    assert "token: asked for; dashboard at http://127.0.0.1:" in said
    assert ": guarded" in said
    assert "disk for spilling: at least" in said
    for what in ("reading: ", "views: ", "encoder: ", "loss: "):  # measured there, not here
        assert re.search(rf"{what}.*\(on [0-9.]+\)", said), said
    assert "nothing stands against pretrain" in said
    assert float(said.rsplit("checked in ", 1)[1].split(" s;")[0]) < 60
    assert too_much == 0  # an autoscaler may add them, and Ray does not say whether there is one
    assert "WARNING: asked: 5 CPUs and 0 GPUs for 4 workers and the stream; not there now: " in why
    assert "1 CPUs for training, 1 CPUs for the stream" in why
    assert (unlabelled, "cluster.train_labels: no node of the cluster has these labels" in which) == (5, True), which
