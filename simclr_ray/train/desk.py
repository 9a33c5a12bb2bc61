"""Where workers leave news for the driver: a tiny actor, so that only the driver prints and keeps the run's status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from simclr_ray.errors import SimclrError
from simclr_ray.observe.metrics import Record


@dataclass
class News:
    """What came in since the driver last looked."""

    records: list[Record] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    rejected: list[Mapping[str, Any]] = field(default_factory=list)
    attempts: int = 0
    """Attempts begun so far, over all lives of the run."""


class _Desk:
    """See the module. The driver holds it; when the driver goes, it goes."""

    def __init__(self, attempts: int) -> None:
        self._news = News(attempts=attempts)
        self._fatal: SimclrError | None = None

    def begin_attempt(self) -> int:
        """Count a life of the worker group and return its number, from 1."""
        self._news.attempts += 1
        return self._news.attempts

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

    def collect(self) -> News:
        """Take the news away."""
        news, self._news = self._news, News(attempts=self._news.attempts)
        return news


Desk = ray.remote(num_cpus=0)(_Desk)
