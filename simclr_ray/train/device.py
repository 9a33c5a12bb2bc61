"""From the views of the stream to views on the device that trains: the smallest thing to move, while it computes.

On CUDA the copy goes from pinned memory on a stream of its own, so it runs beside the step that the device is still
busy with (`ahead` begins it then); so do the colours, where `views.where` is `gpu`, and the copies of their parameters,
one for each group of images. The host waits for none of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from simclr_ray.train.batches import StepBatch
from simclr_ray.views.colour import colour
from simclr_ray.views.policy import Policy
from simclr_ray.views.stage import Where, draws_at

_IMAGES_AT_ONCE = 128
"""Colours are float32 and hold about three times that at their peak: 128 pairs of 224 px take some 500 MB."""


class ViewsOnDevice:
    """Brings the views of one batch after the other to a device."""

    def __init__(self, device: torch.device, policy: Policy, *, seed: int, where: Where) -> None:
        """`policy`, `seed` and `where` are those of the stage that made the views."""
        self._device, self._policy, self._seed, self._where = device, policy, seed, where
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def bring(self, batch: StepBatch) -> Callable[[], Tensor]:
        """Begin to bring the views of a batch.

        Returns:
            What gives them: finished views (n, 2, S, S, 3), uint8, on the device, for the work that is queued after.
        """
        if self._stream is None:
            views = self._finish(batch.views, batch)
            return lambda: views
        stream = self._stream
        with torch.cuda.stream(stream):
            views = self._finish(batch.views.pin_memory().to(self._device, non_blocking=True), batch)
            there = stream.record_event()

        def arrived() -> Tensor:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(there)
            views.record_stream(current)  # or its memory could be handed out again while the step reads it
            return views

        return arrived

    def _finish(self, views: Tensor, batch: StepBatch) -> Tensor:
        return views if self._where == "cpu" else finish_colours(views, batch, self._policy, seed=self._seed)


def finish_colours(crops: Tensor, batch: StepBatch, policy: Policy, *, seed: int) -> Tensor:
    """Do the colours that the stage left out, from the same draws: what it would have made, within 1 level.

    Args:
        crops: (n, 2, S, S, 3) uint8; overwritten.
        batch: Its sample ids, epochs and uses are the address of the draws.
        policy: Of the run.
        seed: Of the run.
    """
    draws = draws_at(
        policy,
        seed=seed,
        epoch=batch.epochs,
        sample_ids=batch.sample_ids,
        sizes=np.full((len(crops), 2), policy.size),  # only crops look at sizes
        use=batch.uses,
    )
    for start in range(0, len(crops), _IMAGES_AT_ONCE):
        rows = slice(start, start + _IMAGES_AT_ONCE)
        chosen = crops[rows]
        chosen.copy_(colour(chosen.flatten(0, 1), draws[rows].flatten(), policy).view_as(chosen))
    return crops
