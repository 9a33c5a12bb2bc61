"""A brake for Ray Data's control loop.

In Ray 2.60 the streaming executor waits for tasks with `ray.wait`. When a slow trainer holds the stream back, tasks
have output that may not be read yet, so the wait returns at once and the loop turns as fast as it can: a whole core of
the coordinator's node, measured as 3.5 times slower training where trainer and coordinator share two cores. A pause
of some milliseconds a turn costs nothing, for one turn handles any number of finished tasks.
"""

from __future__ import annotations

import time
from typing import Any

TURN_S = 0.05


class CalmLoop:
    """Execution callback (`DataContext.custom_execution_callback_classes`) that lets a turn take `TURN_S` at least."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing to do."""

    def on_execution_step(self, executor: Any) -> None:
        """Sleep out the rest of a turn."""
        left = self._last + TURN_S - time.monotonic()
        if left > 0:
            time.sleep(left)
        self._last = time.monotonic()

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""
