"""Processes that benchmarks/loss.py measures in: fresh ones for each implementation and size, told when to work.

They stay alive between turns, so that repeats of all implementations can be interleaved: on a machine that others use
as well, a ratio is only fair between measurements of the same moment. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from loss_peers import IMPLEMENTATIONS, MATMULS, NotRun

Result = TypeVar("Result")

_WARM_UP_ROWS = 32
_PAUSE_S = 0.03
"""Threads of the team before go on spinning for some milliseconds when their work has run out."""
_SPAWN = multiprocessing.get_context("spawn")


class Task(NamedTuple):
    """What the processes of one implementation do."""

    name: str
    rows: int
    """2B, over all ranks."""
    dim: int
    temperature: float
    ranks: int
    threads: int
    """Of each rank."""
    most_bytes: int
    """Of address space that a rank may add to what it has when everything is loaded."""


class Measured(NamedTuple):
    """The first full-size step."""

    loss: float
    """Of all ranks' anchors; NaN of bare matmuls."""
    peak_bytes: int
    """Growth of the resident set, the largest rank's."""
    seconds: float


class Team:
    """The ranks of one task.

    Raises:
        NotRun: In the constructor and in `first_step`; the ranks have ended then.
    """

    def __init__(self, task: Task) -> None:
        """Start and warm up all ranks."""
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(task.ranks):
            here, there = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_serve, args=(task, rank, self._folder.name, there), daemon=True)
            process.start()
            there.close()  # so that the end of the process is an end of file here
            self._pipes.append(here)
            self._processes.append(process)
        self._collect()

    def first_step(self) -> Measured:
        replies = self._ask("peak")
        return Measured(
            loss=sum(reply[0] for reply in replies) / len(replies),
            peak_bytes=max(reply[1] for reply in replies),
            seconds=max(reply[2] for reply in replies),
        )

    def step_seconds(self, repeats: int) -> list[float]:
        """Time of each repeat, the slowest rank's."""
        time.sleep(_PAUSE_S)
        return [max(times) for times in zip(*self._ask(repeats), strict=True)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _ask(self, what: str | int) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(what)
        return self._collect()

    def _collect(self) -> list[Any]:
        """One reply of every rank, or the end of all at the first that has none: the others may wait for it forever."""
        replies: dict[int, Any] = {}
        while len(replies) < len(self._pipes):
            for pipe in wait([p for rank, p in enumerate(self._pipes) if rank not in replies]):
                rank = self._pipes.index(pipe)
                try:
                    reply = self._pipes[rank].recv()
                except EOFError:
                    self._processes[rank].join()
                    if self._processes[rank].exitcode != -signal.SIGKILL:
                        self.close()
                        raise RuntimeError("a rank has ended; its error is above") from None
                    reply = NotRun("killed, as the system does when memory runs out")
                if isinstance(reply, NotRun):
                    self.close()
                    raise reply
                replies[rank] = reply
        return [replies[rank] for rank in range(len(self._pipes))]


def run_once(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call in a fresh process; function, arguments and result must pickle."""
    here, there = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_call, args=(function, arguments, there), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"the process of {function.__name__} has ended; its error is above") from None
    finally:
        process.kill()
        process.join()


def measured_peak(work: Callable[[], Result]) -> tuple[Result, int]:
    """What `work` returns, and by how many bytes the resident set of this process grew at most meanwhile."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # free pages kept by malloc would hide what is allocated into them
    before = _status_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    except OSError:
        return _sampled_peak(work, before)
    result = work()
    return result, _status_bytes("VmHWM") - before


def _sampled_peak(work: Callable[[], Result], before: int) -> tuple[Result, int]:
    seen, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(_status_bytes("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(seen) - before


def available_bytes() -> int:
    """Memory that could be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10


def join_ranks(rank: int, ranks: int, folder: str) -> None:
    """Start gloo on this machine."""
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], pipe: Connection) -> None:
    pipe.send(function(*arguments))


def _serve(task: Task, rank: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(task.threads)
    os.dup2(2, 1)  # what packages print at import is not part of the tables
    if task.ranks > 1:
        join_ranks(rank, task.ranks, folder)
    try:
        _step(task, rank, _WARM_UP_ROWS)()  # loads libraries: torch's first custom op alone imports 150 MB
        step = _step(task, rank, task.rows // task.ranks)
        with contextlib.suppress(ValueError, OSError):  # a lower limit may be in force already
            limit = _status_bytes("VmSize") + task.most_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        pipe.send("ready")
        while True:
            try:
                what = pipe.recv()
            except EOFError:  # the parent has ended
                return
            if what == "peak":
                pipe.send(_first(step, together=task.ranks > 1))
            else:
                if what > 1:
                    step()  # caches are the last team's; where one step is a turn, it is long enough not to matter
                pipe.send([_timed(step, together=task.ranks > 1)[1] for _ in range(what)])
    except NotRun as reason:
        pipe.send(reason)
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            pipe.send(NotRun(f"does not fit into {task.most_bytes / 2**30:.1f} GiB a rank"))
        elif task.name in IMPLEMENTATIONS and IMPLEMENTATIONS[task.name].kind == "peer":
            pipe.send(NotRun(f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"))
        else:
            raise  # what is ours must run
    # A rank that ends early ends the others with it, through the parent; there is nothing to wait for here.


def _step(task: Task, rank: int, rows: int) -> Callable[[], float]:
    """Forward and backward over projections that are there before, as an encoder would have left them."""
    z = torch.randn(rows, task.dim, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    if task.name in MATMULS:
        multiply = MATMULS[task.name](z)

        def floor() -> float:
            multiply()
            return torch.nan

        return floor
    loss_of = IMPLEMENTATIONS[task.name].make(task.temperature)

    def step() -> float:
        z.grad = None
        loss = loss_of(z)
        loss.backward()
        return loss.item()

    return step


def _timed(step: Callable[[], float], *, together: bool) -> tuple[float, float]:
    if together:
        dist.barrier()
    started = time.perf_counter()
    loss = step()
    return loss, time.perf_counter() - started


def _first(step: Callable[[], float], *, together: bool) -> tuple[float, int, float]:
    (loss, seconds), peak = measured_peak(lambda: _timed(step, together=together))
    return loss, peak, seconds


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10
