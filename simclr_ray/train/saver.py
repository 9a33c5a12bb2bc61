"""Saving beside the training: the step pays for a copy of the tensors, a thread writes and commits them.

One save at a time. If the store is slower than the interval, or down, training goes on: an interval whose predecessor
is still being written is passed over, a failed save is told with the age of the newest checkpoint, and only several
failures in a row end the run. Rank 0 alone saves, so nothing here is a collective.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag, auto

from simclr_ray.errors import SimclrError, StorageError
from simclr_ray.train import checkpoint as ckpt


class Verdict(IntFlag):
    """What all ranks do after a step; rank 0 decides, for it alone knows the time and the driver's wishes."""

    GO_ON = 0
    SAVE = auto()
    STOP = auto()


class SavesFailedError(StorageError):
    """Several saves in a row failed. Not for Ray to retry: a new worker group would meet the same store."""


@dataclass(frozen=True)
class Intervals:
    """When to save."""

    steps: int
    """Every so many optimizer steps."""
    seconds: float | None
    """And at the first step after so many seconds since the last save began; None for never."""
    last_step: int
    """The end of the run, which is saved always."""


class Saver:
    """Rank 0's hand at the checkpoints of a run."""

    def __init__(
        self, folder: str, intervals: Intervals, *, keep: int, max_failures: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Prepare for saving.

        Args:
            folder: The run's `checkpoints/`.
            intervals: When to save.
            keep: Committed checkpoints to keep.
            max_failures: Failed saves in a row that end the run.
            say: Told what a user should know.
        """
        self._folder, self._intervals, self._keep = folder, intervals, keep
        self._max_failures, self._say = max_failures, say
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failures = 0
        self._began = self._newest = time.monotonic()
        self._asked, self._stopping = threading.Event(), threading.Event()
        self._seconds: float | None = None
        self._saved: int | None = None

    def save_what_there_is(self, checkpoint: ckpt.Checkpoint, *, first: Callable[[], None]) -> None:
        """Try once to write and commit a state that training cannot go on from, and say how that went."""
        self.wait()
        if self._saved == checkpoint.step:
            return
        self._writing = None
        self._write(checkpoint, first)
        error, self._error = self._error, None
        if error is None:
            self._say(f"the state after step {checkpoint.step} was saved")
        else:
            self._say(f"the state after step {checkpoint.step} could not be saved either: {error}")

    def ask(self) -> None:
        """Save at the next step, for example because a node is about to go. From any thread."""
        self._asked.set()

    def stop(self) -> None:
        """Save at the next step and end there. From any thread."""
        self._stopping.set()

    def verdict(self, step: int) -> Verdict:
        """What to do after `step` steps."""
        if self._stopping.is_set():
            return Verdict.SAVE | Verdict.STOP
        every = self._intervals
        late = every.seconds is not None and time.monotonic() - self._began >= every.seconds
        due = step == every.last_step or step % every.steps == 0 or late or self._asked.is_set()
        return Verdict.SAVE if due else Verdict.GO_ON

    def save(self, checkpoint: ckpt.Checkpoint, *, first: Callable[[], None]) -> float:
        """Copy the tensors and begin to write them.

        Args:
            checkpoint: Of this moment; the tensors may change afterwards.
            first: Called in the writing thread before the checkpoint is written.

        Returns:
            Seconds that the caller was held up.

        Raises:
            SavesFailedError: the last `max_failures` saves failed.
        """
        started = time.monotonic()
        if checkpoint.step == self._intervals.last_step or self._stopping.is_set():
            self._save_last(checkpoint, first)
            return time.monotonic() - started
        if self._asked.is_set():
            self.wait()  # what was asked for is not passed over
        self._look()
        if self._writing is not None:
            self._say(f"checkpoint of step {checkpoint.step} passed over: the one before is still being written")
        else:
            self._begin(ckpt.snapshot(checkpoint), first)
        return time.monotonic() - started

    def _save_last(self, checkpoint: ckpt.Checkpoint, first: Callable[[], None]) -> None:
        """The end of a run, or of this life of it: nothing trains meanwhile, so try until written or failed."""
        while True:
            self.wait()
            self._look()
            if self._saved == checkpoint.step:
                return
            self._begin(checkpoint, first)

    def _begin(self, checkpoint: ckpt.Checkpoint, first: Callable[[], None]) -> None:
        self._was_asked = self._asked.is_set()
        self._asked.clear()
        self._began = time.monotonic()
        self._writing = threading.Thread(target=self._write, args=(checkpoint, first), name="saver", daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Wait for the save in progress, if there is one."""
        if self._writing is not None:
            self._writing.join()

    def age_s(self) -> float:
        """Seconds since the newest committed save began; before the first, since this attempt did."""
        return time.monotonic() - self._newest

    def take_seconds(self) -> float | None:
        """How long the newest save took in its thread; None where none ended since the last call."""
        seconds, self._seconds = self._seconds, None
        return seconds

    def _write(self, checkpoint: ckpt.Checkpoint, first: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            first()
            ckpt.save(self._folder, checkpoint)
            ckpt.prune(self._folder, keep=self._keep)
        except BaseException as error:  # handed to the training thread by `_look`
            self._error = error
        else:
            self._seconds = time.monotonic() - started
            self._newest = started
            self._saved = checkpoint.step

    def _look(self) -> None:
        """Take note of a save that has ended."""
        if self._writing is None or self._writing.is_alive():
            return
        self._writing.join()
        error, self._writing, self._error = self._error, None, None
        if error is None:
            self._failures = 0
            return
        if not isinstance(error, SimclrError):
            raise error
        if self._was_asked:
            self._asked.set()  # within a node's grace there is time for another try
        self._failures += 1
        age = time.monotonic() - self._newest
        if self._failures < self._max_failures:
            self._say(f"checkpoint not saved: {error.what}; training goes on, the newest one is {age:.0f} s old")
            return
        raise SavesFailedError(
            f"{self._failures} checkpoints in a row could not be saved: {error.what}",
            where=self._folder,
            got=f"the newest one is {age:.0f} s old",
            expected=f"fewer than {self._max_failures} failures (train.max_failed_saves)",
            fix="mend the store and run the same command again; it continues from the newest checkpoint",
        ) from error
