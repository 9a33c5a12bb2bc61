"""One batch ahead: the next batch is collected and on its way to the device while this step still computes.

A step waits for its numbers before the weights change (`train.step`), so whatever is only begun after that finds the
device idle. The moment to fetch is when the backward pass has been handed to the device and nobody has waited for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from simclr_ray.train.batches import StepBatch


@dataclass(frozen=True)
class Ready:
    """A batch whose views are on the device, or on their way to it."""

    batch: StepBatch
    arrived: Callable[[], Tensor]
    """Finished views; has the device's current work wait for them, not the host."""


class OneAhead:
    """Iterates over batches; whoever computes calls `fetch` as soon as the device is busy."""

    def __init__(self, batches: Iterator[StepBatch], bring: Callable[[StepBatch], Callable[[], Tensor]]) -> None:
        """Take batches from `batches`; `bring` begins to move the views of one and returns how to wait for them."""
        self._batches, self._bring = batches, bring
        self._next: Ready | None = None
        self._failed: Exception | None = None

    def __iter__(self) -> Iterator[Ready]:
        """Every batch, once. All ranks fetch at the same places of a step, or none.

        What goes wrong while looking ahead is raised in its turn, after the step that was under way.
        """
        while True:
            self.fetch()
            if self._failed is not None:
                raise self._failed
            ready, self._next = self._next, None
            if ready is None:
                return
            yield ready

    def fetch(self) -> None:
        """Take the next batch, if that has not been done and there is one."""
        if self._next is None and self._failed is None:
            try:
                batch = next(self._batches, None)
                self._next = None if batch is None else Ready(batch, self._bring(batch))
            except Exception as error:
                self._failed = error
