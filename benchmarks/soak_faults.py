"""What can happen to a run, for the soak: each fault as a function of the run, drawn by a seed.

Processes are found by a variable of their environment that all processes of one command inherit, never by name alone,
and ended by their process id.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.servers.proxy import Fault, Proxy
from tests.servers.seaweed import Seaweed

MARK = "SIMCLR_RAY_SOAK"
CONTROL_PLANE = ("gcs_server", "raylet")
"""What a local cluster does not survive: the command may end with any code but 0, and goes on when run again."""


@dataclass
class Target:
    """A run under way."""

    process: subprocess.Popen[str]
    mark: str
    server: Seaweed
    proxy: Proxy
    random: random.Random
    notes: list[str] = field(default_factory=list)
    """What was done to it."""
    control_plane_killed: bool = False

    def note(self, text: str) -> None:
        self.notes.append(text)


def marked(mark: str) -> list[psutil.Process]:
    """All processes of one command, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def title(process: psutil.Process) -> str:
    """What a process is, in a word."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return "gone"
    words = " ".join(command)
    for name in (*CONTROL_PLANE, "dashboard", "log_monitor", "runtime_env", "monitor.py"):
        if name in words:
            return name
    return Path(command[0].split("(")[0]).name[:40] if command else "?"


def train_workers(mark: str) -> list[psutil.Process]:
    return [one for one in marked(mark) if "RayTrainWorker" in title(one)]


def _chosen(target: Target, among: list[psutil.Process]) -> psutil.Process | None:
    others = sorted((one for one in among if one.pid != target.process.pid), key=lambda one: one.pid)
    return target.random.choice(others) if others else None


def kill_a_worker(target: Target) -> None:
    one = _chosen(target, train_workers(target.mark))
    if one is not None:
        with contextlib.suppress(psutil.Error):
            one.kill()
            target.note("a train worker killed")


def kill_any_process(target: Target) -> None:
    """Stream tasks, the stream's coordinator, Ray Train's controller, desk and cursor, raylet, GCS, agents."""
    one = _chosen(target, marked(target.mark))
    if one is not None:
        name = title(one)
        target.control_plane_killed |= name in CONTROL_PLANE
        with contextlib.suppress(psutil.Error):
            one.kill()
            target.note(f"{name} killed")


def kill_the_driver(target: Target) -> None:
    target.process.kill()
    target.note("driver killed")


def interrupt(target: Target) -> None:
    target.process.send_signal(signal.SIGINT)
    target.note("Ctrl-C")


def terminate(target: Target) -> None:
    target.process.send_signal(signal.SIGTERM)
    target.note("SIGTERM")


def pause_a_worker(target: Target) -> None:
    _pause(target, _chosen(target, train_workers(target.mark)), target.random.uniform(0.5, 4.0), "a train worker")


def pause_the_driver(target: Target) -> None:
    _pause(target, psutil.Process(target.process.pid), target.random.uniform(0.5, 4.0), "driver")


def _pause(target: Target, one: psutil.Process | None, seconds: float, name: str) -> None:
    if one is None:
        return
    with contextlib.suppress(psutil.Error):
        one.suspend()
        time.sleep(seconds)
        one.resume()
        target.note(f"{name} stopped for {seconds:.1f} s")


def hang_a_worker(target: Target) -> None:
    """One of several: the others find it silent within the collective timeout. Alone it only pauses."""
    workers = train_workers(target.mark)
    if len(workers) < 2:
        pause_a_worker(target)
        return
    one = _chosen(target, workers)
    assert one is not None
    with contextlib.suppress(psutil.Error):
        one.suspend()
        target.note("a train worker stopped for good")


def kill_the_store(target: Target) -> None:
    _store_away(target, target.server.kill, target.server.start, "killed")


def pause_the_store(target: Target) -> None:
    _store_away(target, target.server.pause, target.server.resume, "silent")


def _store_away(target: Target, go: Callable[[], object], come: Callable[[], object], how: str) -> None:
    seconds = target.random.uniform(0.5, 8.0)
    go()
    time.sleep(seconds)
    come()
    target.note(f"store {how} for {seconds:.1f} s")


def _proxied(name: str, make: Callable[[random.Random], Fault]) -> Callable[[Target], None]:
    def happen(target: Target) -> None:
        fault = make(target.random)
        target.proxy.fault(fault)
        target.note(f"{fault.times} requests {name}")

    return happen


storm = _proxied("refused with 503", lambda r: Fault("status", times=r.randint(1, 20)))
resets = _proxied("reset in the body", lambda r: Fault("reset", times=r.randint(1, 3), after=r.randint(0, 5000)))
cuts = _proxied("cut", lambda r: Fault("cut", times=r.randint(1, 3), method="GET", after=r.randint(0, 5000)))
shorts = _proxied("too short", lambda r: Fault("length", method="GET", path="/shard", after=r.randint(1, 5000)))
flips = _proxied("changed", lambda r: Fault("flip", method="GET", path="/shard", after=r.randint(0, 999)))
lost = _proxied("whose answer is lost", lambda r: Fault("lost", times=r.randint(1, 3)))
slow = _proxied("slowed down", lambda r: Fault("late", times=r.randint(1, 10), seconds=r.uniform(0.1, 1.0)))

FAULTS: dict[Callable[[Target], None], int] = {
    kill_a_worker: 5, kill_any_process: 3, kill_the_driver: 2, interrupt: 1, terminate: 1, pause_a_worker: 1,
    pause_the_driver: 1, hang_a_worker: 2, kill_the_store: 1, pause_the_store: 1, storm: 2, resets: 2, cuts: 1,
    shorts: 1, flips: 1, lost: 2, slow: 1,
}  # fmt: skip
"""How often each comes, beside the others."""


def happen(target: Target) -> None:
    """One fault, drawn."""
    fault = target.random.choices(list(FAULTS), weights=list(FAULTS.values()))[0]
    fault(target)


def damage(folder: Path, draw: random.Random) -> str | None:
    """Flip a byte of the newest checkpoint of a local run folder, where an older one is there to fall back on."""
    committed = sorted(file.parent for file in folder.glob("checkpoints/step-*/COMMIT.json"))
    if len(committed) < 2:
        return None
    files = [file for file in sorted(committed[-1].iterdir()) if file.name != "COMMIT.json" and file.stat().st_size]
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"a bit of {file.parent.name}/{file.name} flipped"


def shared_memory_bytes() -> int:
    """What lies in /dev/shm."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return 0
    total = 0
    for one in path.iterdir():
        with contextlib.suppress(OSError):
            total += one.stat().st_blocks * 512
    return total
