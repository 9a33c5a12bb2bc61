"""What the driver does while workers train: it reads the desk, keeps the run folder's status, and passes wishes on.

A stop that is asked for (Ctrl-C, or the SIGTERM of `ray job stop`) lets all ranks save and end at the next step; a
second one ends at once. A node that is about to be taken away has rank 0 save before it goes.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ray

from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.quarantine import Quarantine
from simclr_ray.errors import ConfigError, StorageError
from simclr_ray.observe.console import Console
from simclr_ray.observe.metrics import Recorder
from simclr_ray.train.cluster import draining_nodes
from simclr_ray.train.desk import News
from simclr_ray.train.elastic import Room
from simclr_ray.train.gauges import ray_gauges
from simclr_ray.train.lock import RunLock
from simclr_ray.train.run import RunFolder, read_quarantine, write_quarantine

LOOK_FOR_DRAINS_S = 2.0
SAY_WAITING_S = 30.0
WRITE_EVERY_S = 10.0
"""Between two versions of the quarantine."""
RETRY_S = 5.0
SETTLE_S = 20.0
"""Longest wait, at the end, for the details of rejected images."""


class Keeper:
    """Reads the desk: shows records, keeps the quarantine and the count of attempts in the run folder."""

    def __init__(
        self, run: RunFolder, desk: Any, console: Console, lock: RunLock, manifest: Manifest, limits: Limits,
        room: Room, asked: str,
    ) -> None:  # fmt: skip
        """Prepare; `asked` says in words what was asked of Ray."""
        self._asked, self._room = asked, room
        self._run, self._desk, self._console, self._lock = run, desk, console, lock
        self._quarantine = Quarantine(manifest, limits, read_quarantine(run))
        self._scribe = Scribe(console.say, allowed=lambda: not lock.lost)
        self._recorder = Recorder([ray_gauges(run.uri)])
        self._written = -math.inf
        self._drained: set[str] = set()
        self._looked = 0.0
        self._waiting_since = self._said_waiting = time.monotonic()
        self.attempts = self._begun_before = int((run.info() or {}).get("attempts", 0))
        self.last: Mapping[str, float] = {}
        self.stopping = False

    def stop(self) -> None:
        """Have all ranks save and end."""
        self.stopping = True
        self._console.say("stopping after a last checkpoint; once more to stop at once")
        self._desk.ask_to_stop.remote()

    def look(self) -> None:
        """Take what came in, and pass on what must be known.

        Raises:
            ConfigError: another driver has taken the run folder.
            ClusterError: the workers have left the stream no CPU for too long.
        """
        if self._lock.lost:
            raise ConfigError(
                "another run has taken this folder over",
                where=self._run.uri,
                got=f"it is held by {self._lock.lost}",
                fix="this one was silent for too long (paused, or cut off from the store); let the other go on",
            )
        news: News = ray.get(self._desk.collect.remote())
        for sentence in news.sentences:
            self._console.say(sentence)
        for record in news.records:
            self._console.progress(record)
            self._recorder.log(record)
            self.last = record.values
        self._recorder.again()
        if news.attempts == self._begun_before:
            self._say_waiting()
        if news.attempts != self.attempts:
            self.attempts = news.attempts
            self._scribe.later("run.json", partial(self._run.update, attempts=news.attempts))
        self._quarantine.add(news.rejected)
        self._write_quarantine()
        self._look_for_drains(news.nodes)
        if news.ranks:
            self._room.look(news.ranks)

    def close(self, status: str) -> None:
        """Write how the run ended; a store that is down must not hide why. What another driver holds is left alone."""
        if self._lock.lost:
            return
        try:
            self._run.update(status=status, attempts=self.attempts)
        except StorageError as error:
            self._console.say(f"run.json not written, it does not say {status!r}: {error.what}")

    def _say_waiting(self) -> None:
        """A line now and then while no worker has started."""
        now = time.monotonic()
        if now - self._said_waiting < SAY_WAITING_S:
            return
        self._said_waiting = now
        free, all_ = ray.available_resources(), ray.cluster_resources()
        has = ", ".join(f"{free.get(name, 0):g} of {all_.get(name, 0):g} {name}s free" for name in ("CPU", "GPU"))
        self._console.say(
            f"waiting for {self._asked} for {now - self._waiting_since:.0f} s; the cluster has {has}; "
            "an autoscaler may be adding nodes (cluster.start_timeout_s)"
        )

    def reasons(self) -> str:
        """Counts of rejected images by reason, with names of some; the list in the run folder is complete after it."""
        self._quarantine.settle(SETTLE_S)
        self._written = -math.inf
        self._write_quarantine()
        self._scribe.settle(SETTLE_S)
        return self._quarantine.reasons()

    def _write_quarantine(self) -> None:
        if time.monotonic() - self._written < WRITE_EVERY_S:
            return
        entries = self._quarantine.take_changed()
        if entries is not None:
            self._written = time.monotonic()
            self._scribe.later("quarantine.parquet", partial(write_quarantine, self._run, entries))

    def _look_for_drains(self, nodes: frozenset[str]) -> None:
        if time.monotonic() - self._looked < LOOK_FOR_DRAINS_S:
            return
        self._looked = time.monotonic()
        going = (draining_nodes() & nodes) - self._drained
        if going:
            self._drained |= going
            self._console.say(
                f"{len(going)} node{'s are' if len(going) > 1 else ' is'} about to go; saving a checkpoint"
            )
            self._desk.ask_for_checkpoint.remote()


class Scribe:
    """Writes files of the run folder beside the driver's loop, which must not wait for a store that is down.

    Of several versions of a file only the newest is written; one that fails is tried again, and told once.
    """

    def __init__(self, say: Callable[[str], None], *, allowed: Callable[[], bool] = lambda: True) -> None:
        """Nothing is written while it is not `allowed`."""
        self._say, self._allowed = say, allowed
        self._todo: dict[str, Callable[[], object]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def later(self, name: str, write: Callable[[], object]) -> None:
        """Have `write` write the file of this name soon."""
        with self._lock:
            self._todo[name] = write
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="scribe", daemon=True)
                self._thread.start()

    def settle(self, timeout_s: float) -> None:
        """Wait until all is written."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _work(self) -> None:
        told = False
        while True:
            with self._lock:
                if not self._todo:
                    self._thread = None
                    return
                name = next(iter(self._todo))
                write = self._todo.pop(name)
            try:
                if self._allowed():
                    write()
                told = False
            except StorageError as error:
                if not told:
                    self._say(f"{name} not written, will be tried again: {error.what}")
                told = True
                with self._lock:
                    self._todo.setdefault(name, write)
                time.sleep(RETRY_S)


@contextlib.contextmanager
def graceful_stop(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM; a second SIGINT raises KeyboardInterrupt, a second SIGTERM ends.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def first(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            for each, handler in before.items():
                signal.signal(each, handler)
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        asked = True
        stop()

    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
