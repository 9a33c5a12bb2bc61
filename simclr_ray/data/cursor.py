"""The position of the stream: a tiny actor, in a module of its own so that its process imports little."""

from __future__ import annotations

import ray

from simclr_ray.data.plan import Segment


class _SegmentCursor:
    """Which units the next execution of the stream holds. A tiny actor of the driver's."""

    def __init__(self) -> None:
        self._segment = Segment(0, 0, 0, 0)

    def move(self, segment: Segment) -> None:
        """Choose the units of the next execution; called by rank 0 before it joins the others at the stream."""
        self._segment = segment

    def where(self) -> Segment:
        """Units of the next execution."""
        return self._segment


SegmentCursor = ray.remote(num_cpus=0, max_restarts=-1)(_SegmentCursor)
