"""What a tree of processes takes: CPU time by process, memory, and what everybody else took meanwhile.

Ray's work is spread over a dozen processes, so a rate means little before one knows how many cores stood behind it.
Linux only.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import psutil


class Key(NamedTuple):
    """A process, even after its number has been given away again."""

    pid: int
    born_s: float


@dataclass(frozen=True)
class Mark:
    """The clocks of one moment."""

    wall_s: float
    busy_s: float
    """CPU time of the whole machine since it started, stolen by its host included."""
    titles: dict[Key, str]
    own_s: dict[Key, float]
    """CPU time of every living process of the tree, user and system."""
    ended_s: float
    """CPU time of those that have ended, which the system adds to their parents."""


@dataclass(frozen=True)
class Usage:
    """What happened between two marks."""

    wall_s: float
    by_process: dict[Key, tuple[str, float]]
    """Title at the first mark and CPU seconds; processes that ended meanwhile are summed under `ENDED`."""
    others_cores: float
    """Cores that were busy with something outside the tree, on average: the noise of this measurement."""

    @property
    def cpu_s(self) -> float:
        return sum(seconds for _, seconds in self.by_process.values())


ENDED = Key(0, 0.0)


def tree(root: int) -> list[psutil.Process]:
    top = psutil.Process(root)
    return [top, *top.children(recursive=True)]


def mark(root: int) -> Mark:
    """Read all clocks of the tree below a process."""
    titles, own, ended = {}, {}, 0.0
    for process in tree(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            key, times = Key(process.pid, process.create_time()), process.cpu_times()
            titles[key] = " ".join(process.cmdline()) or process.name()
            own[key] = times.user + times.system
            ended += times.children_user + times.children_system
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return Mark(time.monotonic(), busy, titles, own, ended)


def between(first: Mark, last: Mark) -> Usage:
    """The difference of two marks of the same tree."""
    used = {key: (first.titles.get(key, title), last.own_s[key] - first.own_s.get(key, 0.0))
            for key, title in last.titles.items()}  # fmt: skip
    # A process that has ended took its whole life's time over to its parent; what it had at the first mark was before.
    ended = last.ended_s - first.ended_s - sum(s for key, s in first.own_s.items() if key not in last.own_s)
    used[ENDED] = ("processes that ended", max(0.0, ended))
    wall = last.wall_s - first.wall_s
    total = sum(seconds for _, seconds in used.values())
    return Usage(wall, used, max(0.0, last.busy_s - first.busy_s - total) / wall)


class Memory(NamedTuple):
    """Resident memory of a tree, in bytes."""

    private: int
    """Of one process each."""
    total: int
    """Shared pages, such as the object store's, divided among those that share them."""


def memory(root: int) -> Memory:
    private = total = 0
    for process in tree(root):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            full = process.memory_full_info()
            private, total = private + full.uss, total + full.pss
    return Memory(private, total)


def keep_cores(count: int) -> None:
    """Use no more than `count` cores in this process and all that it starts."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
