"""What each rank is doing, told from outside its training thread, so that a rank that hangs can be named.

A rank notes its step and phase; a thread leaves the note at the driver's desk every few seconds. When a worker group
ends in an error, the notes say who stood where: those that waited for the others say so themselves (their collective
timed out), and the one that they waited for is the one that had not come as far.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.exceptions

EVERY_S = 5.0
RANK_0_EVERY_S = 1.0
"""Rank 0 hears the driver's wishes with the answers to its notes."""

Phase = Literal["start", "data", "compute", "record"]
"""`start`: building and restoring. `data`: waiting for the stream. `compute`: forward, backward and update, with the
collectives in them. `record`: metrics and checkpoints."""
ORDER: tuple[Phase, ...] = ("start", "data", "compute", "record")


@dataclass(frozen=True)
class Note:
    """Where a rank stands."""

    rank: int
    step: int
    phase: Phase
    seconds: float
    """In this phase, when the note was made."""

    @property
    def _progress(self) -> tuple[int, int]:
        return self.step, ORDER.index(self.phase)

    def __str__(self) -> str:
        return f"rank {self.rank} at step {self.step} in {self.phase} for {self.seconds:.0f} s"


class Pulse:
    """Of one rank."""

    def __init__(self, rank: int, desk: Any) -> None:
        self._rank, self._desk = rank, desk
        self._at: tuple[int, Phase, float] = (0, "start", time.monotonic())
        self._every_s = EVERY_S
        self._answered: Callable[[tuple[int, bool]], None] = lambda answer: None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)

    def begin(self, *, on_answer: Callable[[tuple[int, bool]], None], every_s: float) -> None:
        """From here on, hand the desk's answers (see `Desk.pulse`) on."""
        self._answered, self._every_s = on_answer, every_s

    def at(self, step: int, phase: Phase) -> None:
        """Note a new phase."""
        self._at = (step, phase, time.monotonic())

    def note(self) -> Note:
        """Where this rank stands now."""
        step, phase, since = self._at
        return Note(self._rank, step, phase, time.monotonic() - since)

    def _beat(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                answer = ray.get(self._desk.pulse.remote(self.note()))
            except ray.exceptions.RayError:
                return  # the driver is gone, and this group with it
            self._answered(answer)


def behind(notes: Sequence[Note]) -> list[Note]:
    """Ranks that had not come as far as others, the last first; none where all stood alike."""
    if not notes:
        return []
    furthest = max(note._progress for note in notes)
    return sorted((note for note in notes if note._progress < furthest), key=lambda note: (note._progress, note.rank))


def sentence(failed: Sequence[tuple[Note, str]], notes: Sequence[Note]) -> str:
    """Who failed, and whom the group waited for.

    Args:
        failed: Ranks that ended in an error of their own account, and its text.
        notes: The newest note of each rank; those of `failed` are newer.
    """
    newest = {note.rank: note for note in notes} | {note.rank: note for note, _ in failed}
    parts = [f"{note}: {text}" for note, text in failed] or ["workers ended without a word"]
    late = [note for note in behind(list(newest.values())) if note.rank not in {one.rank for one, _ in failed}]
    silent = [note for rank, note in newest.items() if rank not in {one.rank for one, _ in failed}]
    if late:
        parts.append("waited for " + ", ".join(map(str, late[:4])))
    elif silent and failed:
        parts.append("last heard of " + ", ".join(map(str, silent[:4])))
    return "; ".join(parts)
