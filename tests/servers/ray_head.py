"""A Ray head of one's own, as `ray start` makes it: dashboard, jobs and metrics on free ports, with or without token.

    with ray_head(folder, token="...") as head:
        head.dashboard, head.gcs, head.metrics

It runs in the foreground of one process group that this module started and ends, never `ray stop`, which would end
other people's clusters on the machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.servers.seaweed import free_port

STARTED_WITHIN_S = 90.0


@dataclass(frozen=True)
class RayHead:
    """Where a head of one's own is reached."""

    dashboard: str
    """Of the jobs API, http://127.0.0.1:PORT."""
    gcs: str
    """For `ray.init` and `cluster.address`, 127.0.0.1:PORT."""
    metrics: str
    """Prometheus endpoint of its node."""
    environment: Mapping[str, str]
    """For clients: mode of authentication, and the token's file where there is one."""


def has_dashboard() -> bool:
    """Whether `ray[default]` is installed."""
    try:
        import aiohttp_cors  # noqa: F401
        import opencensus  # noqa: F401
        import virtualenv  # noqa: F401
    except ImportError:
        return False
    return True


def authentication(folder: Path, token: str | None) -> dict[str, str]:
    """Environment of a process that belongs to the cluster, or to none."""
    if token is None:
        return {"RAY_AUTH_MODE": "disabled"}
    file = folder / "token"
    file.write_text(token)
    file.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


def clean_environment() -> dict[str, str]:
    """This process's environment without what points to a cluster; the interpreter's folder first in PATH."""
    kept = {
        name: value for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") and not name.startswith("RAY_AUTH_")
    }  # fmt: skip
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


@contextlib.contextmanager
def ray_head(
    folder: Path, *, token: str | None, cpus: int = 2, labels: Mapping[str, str] | None = None
) -> Iterator[RayHead]:
    """Start a head and end it.

    Args:
        folder: For the token and the head's output.
        token: Of the cluster; None for one that asks for none.
        cpus: Declared, whatever the machine has.
        labels: Of its node.
    """
    gcs, dashboard, metrics = free_port(), free_port(), free_port()
    auth = authentication(folder, token) | {"RAY_metrics_report_interval_ms": "1000"}
    # Sockets have at most 107 characters in their path, so not below pytest's folders.
    with tempfile.TemporaryDirectory(prefix="rh", ignore_cleanup_errors=True) as session:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--metrics-export-port={metrics}", f"--num-cpus={cpus}", "--object-store-memory=300000000",
            f"--temp-dir={session}", f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
            f"--ray-client-server-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}",
        ]  # fmt: skip
        if labels:
            command.append("--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()))
        output = folder / "head.log"
        with output.open("wb") as log:
            process = subprocess.Popen(
                command, env=clean_environment() | auth, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            wait_for_answer(f"http://127.0.0.1:{dashboard}/api/jobs/", process, output)
            yield RayHead(
                f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", f"http://127.0.0.1:{metrics}/metrics", auth
            )
        finally:
            end(process)


def wait_for_answer(
    url: str, process: subprocess.Popen[bytes], output: Path, *, within_s: float = STARTED_WITHIN_S
) -> None:
    """Until a server answers, be it by asking for a token; its output is told where it ends or stays silent."""
    end = time.monotonic() + within_s
    while True:
        assert process.poll() is None, output.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError as answer:
            if answer.code in (401, 403):
                return
        except OSError:
            pass
        assert time.monotonic() < end, f"no answer after {within_s} s: {output.read_text()[-3000:]}"
        time.sleep(0.2)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a node and all it started; some of them are in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(below, timeout=5)
    if process.poll() is None:
        process.kill()
        process.wait()
