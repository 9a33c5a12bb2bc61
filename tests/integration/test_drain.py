"""A node that is about to go says so to its cluster, as a preStop hook does, and waits for what runs on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.servers.ray_head import clean_environment, has_dashboard, ray_head

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not has_dashboard(), reason="no head to wait for: ray[default] is not installed"),
]
BUSY_S = 15
PROGRAM = f"""
import json, subprocess, sys, time, ray
from simclr_ray.train.cluster import draining_nodes
ray.init(address=sys.argv[1], log_to_driver=False)
busy = ray.remote(lambda: time.sleep({BUSY_S}))
began, task = time.monotonic(), busy.remote()
hook = subprocess.Popen([sys.executable, "-m", "simclr_ray.train.drain", "--seconds", "90", "--address", sys.argv[1]])
while not (seen := sorted(draining_nodes())) and hook.poll() is None:
    time.sleep(0.1)
told = time.monotonic() - began
code = hook.wait()
mine = ray.get_runtime_context().get_node_id()
print(json.dumps([code, seen == [mine], told, time.monotonic() - began]))
"""


def test_the_hook_tells_the_cluster_and_ends_when_the_node_is_idle(tmp_path: Path) -> None:
    with ray_head(tmp_path, token=None) as head:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, head.gcs], env=clean_environment() | dict(head.environment), cwd=ROOT,
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, told_of_this_node, told, ended = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert told_of_this_node
    assert told < ended
    assert BUSY_S <= ended < 90, "not before the task, and long before the deadline"
