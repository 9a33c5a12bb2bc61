"""The lock of a run folder: one driver at a time, wherever it runs.

`lock.json` is made by put-if-absent, so of two drivers that start at the same moment one wins. The holder beats: it
replaces the file by compare-and-swap every few seconds. A lock whose holder no longer beats is taken over, by
compare-and-swap too. Clocks of two machines may differ by any amount, so a stamp alone never decides that a holder is
dead: whoever finds a lock that looks stale watches it for longer than a beat takes, by its own monotonic clock.

Where the store has no compare-and-swap (every one but local folders and S3), the promise is weaker. The holder beats
by a plain write after it has read its own token; a stale lock is deleted and made anew; and whoever made the file reads
it again a little later, for a slower one may have written over it. Two drivers that get by all of this, as when one is
halted between its look and its write, find out at their next beat: one of them reads the other's token and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from simclr_ray import storage
from simclr_ray.errors import HeldError, StorageError

LOCK_NAME = "lock.json"
BEAT_S = 10.0
"""Between two beats of the holder."""
STALE_S = 60.0
"""A lock with a stamp younger than this is held, whatever else."""
WATCH_S = 2.5 * BEAT_S
"""How long a lock that looks stale is watched before it is taken."""
SETTLE_S = 3.0
"""After this a new lock is read again where the store cannot swap; longer than a look and a write take, as a rule."""


@dataclass(frozen=True)
class Holder:
    """What the file says."""

    token: str
    """Of this one attempt to hold."""
    host: str
    boot: str
    """Of the machine's start: process ids mean something only within it."""
    pid: int
    beat: int
    beaten: float
    """Seconds since 1970 by the holder's clock; for people, and as a hint."""

    def encode(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self)).encode()


def _decode(data: bytes) -> Holder:
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError):
        return Holder("", "unknown", "", 0, 0, 0.0)  # not ours, or half written: nobody who beats


def holder_of(folder: str) -> Holder | None:
    """Who holds a run folder, or did when it ended without a word; None where nobody does. Takes nothing.

    Raises:
        StorageError: the store fails.
    """
    try:
        return _decode(storage.read_bytes(storage.join(folder, LOCK_NAME)))
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Pace:
    """Times in seconds; tests shorten them."""

    beat_s: float = BEAT_S
    stale_s: float = STALE_S
    watch_s: float = WATCH_S
    settle_s: float = SETTLE_S


class RunLock:
    """Held from `hold` on. Ask `lost` before anything that only the holder may do."""

    def __init__(self, folder: str, pace: Pace) -> None:
        self._uri, self._pace = storage.join(folder, LOCK_NAME), pace
        self._mine = Holder(uuid.uuid4().hex, socket.gethostname(), _boot(), os.getpid(), 0, time.time())
        self._swaps = storage.can_swap(self._uri)
        self._version: str | None = None
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self.lost: str | None = None
        """Who holds it instead; None as long as nobody does."""

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the lock, or say who has it.

        Raises:
            HeldError: another driver holds it.
            StorageError: the folder cannot be written.
        """
        while not (self._create_or_take(say) and self._is_settled()):
            pass
        self._version = self._read_version()
        self._beating.start()

    def release(self) -> None:
        """Stop beating and remove the file, if it is still ours."""
        self._stop.set()
        self._beating.join()
        with contextlib.suppress(StorageError, FileNotFoundError):
            data, _ = storage.read_versioned(self._uri)
            if _decode(data).token == self._mine.token:
                storage.delete_file(self._uri)

    def _create_or_take(self, say: Callable[[str], None]) -> bool:
        """One try; False where the file changed under it, so that it must be looked at again."""
        if storage.create_bytes(self._uri, self._mine.encode()):
            return True
        try:
            data, version = storage.read_versioned(self._uri)
        except FileNotFoundError:
            return False  # released between the two
        holder = _decode(data)
        self._refuse_living(holder)
        if not _is_dead_here(holder):
            say(f"the lock of {self._uri} looks stale; watching it for {self._pace.watch_s:.0f} s")
            time.sleep(self._pace.watch_s)
        if not self._take(data, version):  # it beats after all, or another one took it in the meantime
            return False
        say(f"took over the lock of process {holder.pid} on {holder.host}, which no longer beats")
        return True

    def _take(self, stale: bytes, version: str | None) -> bool:
        """Put our lock in place of a stale one, if that is still there."""
        if self._swaps:
            version = version or storage.digest(stale)
            return storage.replace_bytes(self._uri, self._mine.encode(), version=version) is not None
        with contextlib.suppress(FileNotFoundError):
            if storage.read_bytes(self._uri) != stale:
                return False
        storage.delete_file(self._uri)
        return storage.create_bytes(self._uri, self._mine.encode())

    def _is_settled(self) -> bool:
        """Whether the lock that we made is still ours after a while; where the store can swap, nothing can happen."""
        if self._swaps:
            return True
        time.sleep(self._pace.settle_s)
        try:
            return _decode(storage.read_bytes(self._uri)).token == self._mine.token
        except FileNotFoundError:
            return False

    def _refuse_living(self, holder: Holder) -> None:
        age = time.time() - holder.beaten
        if _is_dead_here(holder) or not 0 <= age < self._pace.stale_s:
            return
        raise HeldError(
            "another run holds this folder",
            where=self._uri,
            got=f"process {holder.pid} on {holder.host}, last heartbeat {age:.0f} s ago",
            fix=f"choose another run.folder; if that process is dead, run again in {self._pace.stale_s - age:.0f} s",
        )

    def _read_version(self) -> str | None:
        data, version = storage.read_versioned(self._uri)
        holder = _decode(data)
        if holder.token != self._mine.token:
            self.lost = f"process {holder.pid} on {holder.host}"
        return version or storage.digest(data)

    def _beat(self) -> None:
        while not self._stop.wait(self._pace.beat_s):
            self._mine = replace(self._mine, beat=self._mine.beat + 1, beaten=time.time())
            # An outage of the store is no reason to stop: after it, the swap tells whether the lock is still ours.
            with contextlib.suppress(StorageError, FileNotFoundError):
                if self._swaps:
                    self._swap()
                else:
                    self._look_and_write()
            if self.lost:
                return

    def _swap(self) -> None:
        version = storage.replace_bytes(self._uri, self._mine.encode(), version=self._version or "")
        if version is None:
            version = self._read_version()  # a swap that was done but whose answer was lost is ours too
        self._version = version

    def _look_and_write(self) -> None:
        try:
            self._read_version()
        except FileNotFoundError:  # another one is taking it over: whoever makes it first has it
            storage.create_bytes(self._uri, self._mine.encode())
            return
        if not self.lost:
            storage.write_bytes(self._uri, self._mine.encode())


@contextlib.contextmanager
def hold(folder: str, say: Callable[[str], None], pace: Pace | None = None) -> Iterator[RunLock]:
    """Hold the lock of a run folder.

    Args:
        folder: The run folder.
        say: Told about a lock that is watched or taken over.
        pace: Times.

    Raises:
        HeldError: another driver holds it.
        StorageError: the folder cannot be written.
    """
    lock = RunLock(folder, pace or Pace())
    lock.acquire(say)
    try:
        yield lock
    finally:
        lock.release()


def is_alive(holder: Holder) -> bool:
    """Whether a holder beat lately and is not known to be dead; by its own clock, so a hint and no proof."""
    return not _is_dead_here(holder) and time.time() - holder.beaten < STALE_S


def _is_dead_here(holder: Holder) -> bool:
    """Whether it was a process of this very machine that is no more."""
    if holder.host != socket.gethostname() or holder.boot != _boot() or not holder.boot:
        return False
    if holder.pid == os.getpid():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _boot() -> str:
    """Identity of the machine's start and of its process-id namespace, so that two containers are told apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
