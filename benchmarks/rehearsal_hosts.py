"""The cluster of benchmarks/rehearsal.py: Ray on hosts that are network namespaces, each started by `ray start`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.servers.hosts import INTERFACE, Host
from tests.servers.ray_head import authentication, clean_environment, end, wait_for_answer

GCS, DASHBOARD = 6379, 8265
QUICK = {
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
"""A host that is silent for some seconds is lost; Ray's own default is half a minute."""


class Cluster:
    """Ray on the hosts, each started by `ray start` there."""

    def __init__(self, net: dict[str, Host], folder: Path, environment: dict[str, str]) -> None:
        self._net, self._folder = net, folder
        self.environment = clean_environment() | authentication(folder, secrets.token_hex(16)) | environment
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def dashboard(self) -> str:
        """Of the jobs API."""
        return f"http://{self._net['head'].address}:{DASHBOARD}"

    def start_head(self) -> None:
        """A head without a CPU for work."""
        address = self._net["head"].address
        self._start("head", "--head", f"--port={GCS}", f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD}",
                    "--num-cpus=0")  # fmt: skip
        wait_for_answer(f"{self.dashboard}/api/jobs/", self._started["head"], self._folder / "head.log")

    def start(self, name: str) -> None:
        """A node of one CPU, with its role as a label."""
        role = name.partition("-")[0]
        self._start(name, f"--address={self._net['head'].address}:{GCS}", "--num-cpus=1", f"--labels=role={role}")

    def freeze(self, name: str) -> None:
        """Stop every process of a host as it stands."""
        for process in self._net[name].processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)

    def lose(self, name: str) -> None:
        """End what is left of a host, and its disk."""
        self._net[name].power_off()
        self._started.pop(name).wait()
        shutil.rmtree(self._disk(name), ignore_errors=True)

    def stop(self) -> None:
        """End all, the head last."""
        for process in reversed(self._started.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
            end(process)

    def _disk(self, name: str) -> Path:
        """Of a host alone: nodes that start at once in one folder take each other's sockets."""
        return self._folder / name

    def _start(self, name: str, *arguments: str) -> None:
        host = self._net[name]
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host.address}",
            f"--temp-dir={self._disk(name)}", "--object-store-memory=300000000", "--disable-usage-stats", *arguments,
        ]  # fmt: skip
        # Of a host's name, gloo would take the address of this machine.
        environment = self.environment | QUICK | {"GLOO_SOCKET_IFNAME": INTERFACE}
        with (self._folder / f"{name}.log").open("ab") as log:
            self._started[name] = subprocess.Popen(
                host.command(command), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
