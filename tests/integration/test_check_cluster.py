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


def test_a_cluster_that_is_given_is_looked_at_and_what_it_cannot_give_is_code_5(
    data_set: Manifest, tmp_path: Path
) -> None:
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
    (code, said, err), (too_much, _, why), (unlabelled, _, which) = json.loads(done.stdout.splitlines()[-1])
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
    assert (too_much, "the cluster can never give 5 CPUs" in why) == (5, True), why
    assert (unlabelled, "cluster.train_labels: no node of the cluster has these labels" in which) == (5, True), which
