"""What this process asked of its stores: figures for `requests an image` and for how often retries were needed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counters:
    """Totals since the process started; differences of two are what happened between them."""

    requests: int = 0
    """Requests sent, each attempt for itself; local files count one for each file opened or looked at."""
    bytes: int = 0
    """Bytes of bodies received."""
    bytes_written: int = 0
    """Bytes of bodies sent."""
    retries: Mapping[str, int] = field(default_factory=dict)
    """Attempts that failed and were repeated, by kind (see `s3_errors`)."""


class Meter:
    """Counts under a lock, for many threads read at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._read = self._written = 0
        self._retries: Counter[str] = Counter()

    def request(self) -> None:
        """One more request was sent."""
        with self._lock:
            self._requests += 1

    def read(self, count: int) -> None:
        """Bytes came."""
        with self._lock:
            self._read += count

    def wrote(self, count: int) -> None:
        """Bytes went."""
        with self._lock:
            self._written += count

    def retry(self, kind: str) -> None:
        """An attempt failed and will be repeated."""
        with self._lock:
            self._retries[kind] += 1

    def total(self) -> Counters:
        """All so far."""
        with self._lock:
            return Counters(self._requests, self._read, self._written, dict(self._retries))


METER = Meter()
