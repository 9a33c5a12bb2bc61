"""How ranks come by each other's projections: three ways to the same sums and gradients.

========  ==========================================  =================  ======================================
way       a rank computes                             and holds          and receives
========  ==========================================  =================  ======================================
gather    its rows against all columns                all (2B, D) once   (2B, D)
half      each pair of ranks once, for both of them   all (2B, D) twice  (2B, D) and a reduce-scatter of as much
ring      its rows against all columns                three ranks' rows  (2B, D) twice, a rank at a time
========  ==========================================  =================  ======================================

Uneven shares are padded while they are gathered, which takes half as much again for that moment; the reduce-scatter is
an all-reduce then, and on gloo. `half` saves FLOPs only with a kernel that computes a pair once for both ends, as
`TorchTiles` does and `TritonTiles` does not.

In all three a rank takes its own block by symmetry, each pair once. Unit projections go round by view, (2, n, D), so
that which view a column belongs to is its place; ranks may hold different numbers of images, also none. Collectives
happen here and in the forward pass only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from simclr_ray.collectives import (
    all_gather_equal,
    all_gather_rows,
    all_reduce_max_,
    all_reduce_sum,
    rank,
    reduce_scatter_rows_,
    ring,
)
from simclr_ray.learn.tiles import ALL_QUADRANTS, RowSums

_ONE_GATHER_BYTES = 16 << 20
"""Up to this size of all projections, a copy costs less than a second collective."""
ExchangeName = Literal["gather", "half", "ring"]


class Block(NamedTuple):
    """Columns of other ranks that this rank takes its rows against."""

    columns: Tensor
    """(2, k, D)."""
    images: slice
    """Which of the global batch's B images these are."""
    quadrants: tuple[tuple[int, int], ...] = ALL_QUADRANTS
    """(row view, column view) pairs that are this rank's to compute."""


class Exchange(Protocol):
    """What the loss needs to know about the other ranks."""

    unit: Tensor
    """This rank's rows, (2, n, D), as they are kept here: to be used instead of those that were given."""
    tracked: int
    """Images that this rank keeps sums and gradients for."""
    own: slice
    """Where this rank's images are among the tracked ones."""
    mirrored: bool
    """Blocks are credited to their columns too, so `tracked` is the whole global batch."""

    def blocks(self) -> Iterator[Block]:
        """Every block of this rank's, in an order that all ranks can follow. A collective, in some ways."""

    def complete_sums(self, sums: RowSums) -> RowSums:
        """From what this rank added up for the tracked images to everything about its own, (.., 2, n)."""

    def complete_gradient(self, gradient: Tensor) -> Tensor:
        """The same for the gradient: (2, tracked, D) to (2, n, D)."""


def make_exchange(name: ExchangeName, unit: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Exchange:
    """Open an exchange of `unit`, this rank's (2, n, D); `counts` are the images of every rank."""
    ways: dict[ExchangeName, type[Gather] | type[Ring]] = {"gather": Gather, "half": Half, "ring": Ring}
    return ways[name](unit, counts, group)


class Gather:
    """Every rank holds all columns."""

    mirrored = False

    def __init__(self, unit: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> None:
        """Gather. Large batches take one collective a view, so that its columns lie together without a copy."""
        self._counts, self._rank, self._group, self.unit = counts, rank(group), group, unit
        self._columns = _gather_views(unit, counts, group)  # (2, B, D)
        start = sum(counts[: self._rank])
        self._mine = slice(start, start + counts[self._rank])
        self.tracked, self.own = counts[self._rank], slice(0, counts[self._rank])

    def blocks(self) -> Iterator[Block]:
        """The images before this rank's and those after."""
        for images in (slice(0, self._mine.start), slice(self._mine.stop, self._columns.shape[1])):
            if images.start < images.stop:
                yield Block(self._columns[:, images], images)

    def complete_sums(self, sums: RowSums) -> RowSums:
        """Complete as they are."""
        return sums

    def complete_gradient(self, gradient: Tensor) -> Tensor:
        """Complete as it is."""
        return gradient


class Half(Gather):
    """Every rank holds all columns, and computes for both ends of a pair.

    Rank r takes the ranks that follow it around the circle, up to the one opposite. With an even number of ranks the
    opposite pair is shared: the lower rank takes all its rows against the other's views a, the upper one its views b
    against all of the other's.
    """

    mirrored = True

    def __init__(self, unit: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> None:
        """Gather as `Gather` does, and track all images."""
        super().__init__(unit, counts, group)
        self.tracked, self.own = self._columns.shape[1], self._mine

    def blocks(self) -> Iterator[Block]:
        """Following ranks, neighbours in memory taken as one block."""
        ranks = len(self._counts)
        followers = (ranks - 1) // 2
        for images in _runs(self._counts, self._rank + 1, followers):
            yield Block(self._columns[:, images], images)
        if ranks % 2 == 0 and ranks > 1:
            lower = self._rank < ranks // 2
            quadrants = ((0, 0), (1, 0)) if lower else ((1, 0), (1, 1))
            for images in _runs(self._counts, self._rank + ranks // 2, 1):
                yield Block(self._columns[:, images], images, quadrants)

    def complete_sums(self, sums: RowSums) -> RowSums:
        """Add up over the ranks: each knows a part of every row."""
        sums.rescale_(all_reduce_max_(sums.shift.clone(), self._group))
        totals = all_reduce_sum(sums.totals, self._group)
        hardest = all_reduce_max_(sums.hardest, self._group)
        return RowSums(totals, hardest, sums.shift).images(self._mine)

    def complete_gradient(self, gradient: Tensor) -> Tensor:
        """Sum over the ranks and keep this rank's, a view at a time."""
        for view in gradient:
            reduce_scatter_rows_(view, self._counts, self._group)
        return gradient[:, self._mine]


class Ring:
    """No rank ever holds more than its own columns and two others'; they go round once for each sweep."""

    mirrored = False

    def __init__(self, unit: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> None:
        """Keep the rows as they travel: images first, so that a rank's share is a number of rows."""
        self._travelling, self._counts, self._group = unit.transpose(0, 1).contiguous(), counts, group
        self.unit = self._travelling.transpose(0, 1)
        self.tracked, self.own = unit.shape[1], slice(0, unit.shape[1])

    def blocks(self) -> Iterator[Block]:
        """The other ranks' columns as they come by."""
        starts = [sum(self._counts[:owner]) for owner in range(len(self._counts))]
        for owner, block in ring(self._travelling, self._counts, self._group):
            yield Block(block.transpose(0, 1), slice(starts[owner], starts[owner] + len(block)))

    def complete_sums(self, sums: RowSums) -> RowSums:
        """Complete as they are."""
        return sums

    def complete_gradient(self, gradient: Tensor) -> Tensor:
        """Complete as it is."""
        return gradient


def gather_facts(
    numbers: Tensor, by_view: Tensor, counts: Sequence[int], group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """What is small against the projections, in one collective.

    Args:
        numbers: (k,) float64 of this rank.
        by_view: (2, n), of float64 or a narrower dtype.
        counts: Images n of every rank.
        group: Ranks that take part; None = all.

    Returns:
        (W, k) numbers of all ranks, and (2, B) in `by_view`'s dtype.
    """
    longest = max(counts)
    mine = numbers.new_zeros((len(numbers) + 2 * longest,))
    mine[: len(numbers)] = numbers
    mine[len(numbers) :].view(2, longest)[:, : by_view.shape[1]] = by_view
    everyone = all_gather_equal(mine, group)
    views = everyone[:, len(numbers) :].view(len(counts), 2, longest)
    parts = [views[r, :, :count] for r, count in enumerate(counts)]
    return everyone[:, : len(numbers)], torch.cat(parts, dim=1).to(by_view.dtype)


def _gather_views(unit: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
    if len(counts) == 1:
        return unit
    if 2 * sum(counts) * unit.shape[2] * unit.element_size() <= _ONE_GATHER_BYTES:
        rows = all_gather_rows(unit.transpose(0, 1).contiguous(), counts, group)  # (B, 2, D)
        return rows.transpose(0, 1).contiguous()
    columns = unit.new_empty((2, sum(counts), unit.shape[2]))
    for view in (0, 1):
        all_gather_rows(unit[view], counts, group, out=columns[view])
    return columns


def _runs(counts: Sequence[int], first: int, ranks: int) -> list[slice]:
    """Images of `ranks` ranks from `first` on, around the end: at most two runs, none of them empty."""
    runs: list[slice] = []
    for other in (r % len(counts) for r in range(first, first + ranks)):
        start = sum(counts[:other])
        if runs and runs[-1].stop == start:
            runs[-1] = slice(runs[-1].start, start + counts[other])
        else:
            runs.append(slice(start, start + counts[other]))
    return [run for run in runs if run.start < run.stop]
