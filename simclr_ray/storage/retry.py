"""The one layer of retries: exponential backoff with full jitter under a deadline.

What counts as passing is for the backend's judge to say; here is only when to try again. Full jitter (each pause drawn
evenly from zero to the ceiling) spreads the processes that one outage hit at the same moment; it is analysed in Marc
Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from simclr_ray.errors import SimclrError
from simclr_ray.storage.counting import METER

log = logging.getLogger("simclr_ray.storage")

BASE_S = 0.1
"""Ceiling of the first pause, in seconds."""
CAP_S = 10.0
"""Ceiling of every pause."""
BYTES_PER_DEADLINE = 16 << 20
"""A body above this many bytes gets the deadline again for each such piece: 140 kB/s at the default of 120 s."""
QUIET_S = 5.0
"""An operation that has been trying for longer says so in the log, once."""

_random = random.SystemRandom()
"""Not the global generator: a training seeds that alike on all ranks, and their pauses must differ."""

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """What a failed attempt was."""

    kind: str
    """One of the words that `storage.counters().retries` counts by."""
    passing: bool
    """Whether another attempt may succeed."""


class Deadline:
    """Time that is left for an operation."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock, self._start = seconds, clock, clock()
        self._allowed = seconds

    def restart(self) -> None:
        """Let the operation begin now."""
        self._start = self._clock()

    def allow_for(self, size: int) -> None:
        """Grant a large body its time, see `BYTES_PER_DEADLINE`."""
        self._allowed = self._seconds * max(1.0, size / BYTES_PER_DEADLINE)

    @property
    def elapsed(self) -> float:
        """Seconds since the operation began."""
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds until the operation must end, not below zero."""
        return max(0.0, self._allowed - self.elapsed)


class GaveUp(Exception):
    """The last attempt's error is the cause; the backend turns it into a sentence."""

    def __init__(self, fault: Fault, attempts: int, elapsed: float) -> None:
        self.fault, self.attempts, self.elapsed = fault, attempts, elapsed
        super().__init__(f"{fault.kind} after {attempts} attempts in {elapsed:.1f} s")


def ceiling(failures: int) -> float:
    """Longest pause after so many failures in a row (from 1), in seconds."""
    return float(min(CAP_S, BASE_S * 2.0 ** min(failures - 1, 60)))


def pause(failures: int, left: float, uniform: Callable[[float, float], float] = _random.uniform) -> float:
    """Seconds to wait after so many failures: drawn evenly up to the ceiling, never beyond the deadline."""
    return min(uniform(0.0, ceiling(failures)), left)


def repeat(
    attempt: Callable[[int], T],
    judge: Callable[[Exception], Fault],
    deadline: Deadline,
    *,
    what: str,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call `attempt(0)`, `attempt(1)`, ... until one succeeds, fails for good, or the deadline has passed.

    An attempt that begins before the deadline is not cut off by it, only by the connection's own limits. Our own
    sentences and FileNotFoundError are answers, not failures, and go through.

    Raises:
        GaveUp: from the last attempt's error.
    """
    failures, said = 0, False
    while True:
        try:
            return attempt(failures)
        except (SimclrError, FileNotFoundError):
            raise
        except Exception as error:
            failures += 1
            fault = judge(error)
            if not fault.passing or not deadline.left:
                raise GaveUp(fault, failures, deadline.elapsed) from error
            METER.retry(fault.kind)
            if not said and deadline.elapsed > QUIET_S:
                said = True
                log.warning("%s: %s; trying again for up to %.0f s", what, fault.kind, deadline.left)
            sleep(pause(failures, deadline.left))
