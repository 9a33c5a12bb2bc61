"""Where workers leave news for the driver: a tiny actor, so that only the driver prints and keeps the run's status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from simclr_ray.errors import SimclrError
from simclr_ray.observe.metrics import Record
from simclr_ray.train.pulse import Note, sentence


@dataclass
class News:
    """What came in since the driver last looked."""

    records: list[Record] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    rejected: list[Mapping[str, Any]] = field(default_factory=list)
    attempts: int = 0
    """Attempts begun so far, over all lives of the run."""
    nodes: frozenset[str] = frozenset()
    """Ids of the nodes that the ranks of the current attempt run on."""
    ranks: int = 0
    """How many they are."""


class _Desk:
    """See the module. The driver holds it; when the driver goes, it goes."""

    def __init__(self, attempts: int) -> None:
        self._news = News(attempts=attempts)
        self._fatal: SimclrError | None = None
        self._nodes: dict[int, str] = {}
        self._notes: dict[int, Note] = {}
        self._failed: list[tuple[Note, str]] = []
        self._asked, self._stopping = 0, False
        self._group, self._needed = "none", True
        self._ended: str | None = None

    def begin_attempt(self) -> int:
        """Count a life of the worker group and return its number, from 1."""
        self._news.attempts += 1
        if self._ended:
            self.say(f"attempt {self._news.attempts}; the one before ended: {self._ended}")
        self._ended = None
        return self._news.attempts

    def attempts(self) -> int:
        """Attempts begun so far."""
        return self._news.attempts

    def join(self, rank: int, node: str, group: str) -> bool:
        """Say where a rank runs, and in which group of workers; the first thing that each rank of an attempt says.

        Returns:
            Whether to train at all, the same for all ranks of the attempt: not after an error that every restart would
            meet again, nor where a stop was asked for while there was no group to hear it.
        """
        if group != self._group:
            self._group, self._nodes = group, {}
            self._ended = self.why_it_ended() or self._ended
            self._needed = self._fatal is None and not self._stopping
        self._nodes[rank] = node
        return self._needed

    def pulse(self, note: Note) -> tuple[int, bool]:
        """Leave where a rank stands; returns how often a checkpoint was asked for so far, and whether to stop."""
        self._notes[note.rank] = note
        return self._asked, self._stopping

    def stumble(self, note: Note, text: str) -> None:
        """Leave the error of a rank that Ray may restart."""
        self._failed.append((note, text))

    def why_it_ended(self) -> str | None:
        """What the ranks said about the end of the last attempt, once; None where they said nothing."""
        if not self._failed and not self._notes:
            return None
        said = sentence(self._failed, list(self._notes.values()))
        self._failed, self._notes = [], {}
        return said

    def ask_for_checkpoint(self) -> None:
        """Have rank 0 save at its next step."""
        self._asked += 1

    def ask_to_stop(self) -> None:
        """Have all ranks save and end at their next step."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stopping

    def post(self, record: Record) -> None:
        """Leave a record for the console."""
        self._news.records.append(record)

    def say(self, text: str) -> None:
        """Leave a sentence for the console."""
        self._news.sentences.append(text)

    def reject(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Leave rejected images for the quarantine."""
        self._news.rejected += entries

    def fail(self, error: SimclrError) -> None:
        """Leave an error that every restart would meet again."""
        self._fatal = self._fatal or error

    def fatal(self) -> SimclrError | None:
        """The error that was left, if any."""
        return self._fatal

    def pardon(self) -> None:
        """Forget the error: the driver has dealt with it."""
        self._fatal = None

    def collect(self) -> News:
        """Take the news away."""
        news, self._news = self._news, News(attempts=self._news.attempts)
        news.nodes, news.ranks = frozenset(self._nodes.values()), len(self._nodes)
        return news


Desk = ray.remote(num_cpus=0)(_Desk)
