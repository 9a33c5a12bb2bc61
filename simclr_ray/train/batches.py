"""One rank's batches: its blocks of units of each step, in the plan's order, checked against the plan's arithmetic.

Every rank knows from arithmetic alone which units it gets and when the stream ends, so no rank ever discovers the
end by itself and leaves the others waiting in a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_ray.data.plan import Segment, segments, share
from simclr_ray.errors import ClusterError


@dataclass(frozen=True)
class StepBatch:
    """A rank's share of one step."""

    step: int
    """The step this batch is for, counted from 0."""
    views: Tensor
    """(n, 2, S, S, 3) uint8, finished or, with `views.where: gpu`, crops; n may differ by one block of units between
    ranks and steps."""
    sample_ids: np.ndarray
    """(n,) int64."""
    epochs: np.ndarray
    """(n,) int64; with `uses`, the rest of the address of each image's draws."""
    uses: np.ndarray
    """(n,) int64: how often the sample stood in its unit before, in place of a rejected one."""
    micro_batches: tuple[int, ...]
    """Images of each micro-batch, in the order of `views`; they add up to n."""
    images_by_rank: tuple[int, ...]
    """Images that each rank has in this step."""
    rejected: tuple[tuple[int, int], ...]
    """(sample id, reason code) of the images that could not be used."""
    animated: int
    """Images that are the first of several frames."""
    wait_s: float
    """Time this rank waited for its units."""


@dataclass(frozen=True)
class Shares:
    """Where a rank stands among the others."""

    rank: int
    world_size: int
    units_per_step: int
    units_per_micro_batch: int
    unit_rows: int
    max_units: int
    """Units of one execution of the stream."""
    prefetch_units: int
    units_per_block: int = 1
    """Consecutive units that are dealt together; they divide a micro-batch."""

    @property
    def block_rows(self) -> int:
        """Images of a block."""
        return self.unit_rows * self.units_per_block

    def blocks(self, step: int, rank: int | None = None) -> range:
        """A rank's blocks of a step (this one's without a word)."""
        return self._blocks(step, self.rank if rank is None else rank, self.units_per_step)

    def _blocks(self, piece: int, rank: int, units: int) -> range:
        return share(piece, rank, per_step=units // self.units_per_block, world_size=self.world_size)

    def micro_batches(self, step: int) -> tuple[int, ...]:
        """Images of this rank in each micro-batch of a step: runs of the step's units, so the order is the step's."""
        count = self.units_per_step // self.units_per_micro_batch
        return tuple(
            self.block_rows * len(self._blocks(piece, self.rank, self.units_per_micro_batch))
            for piece in range(step * count, (step + 1) * count)
        )

    def images_by_rank(self, step: int) -> tuple[int, ...]:
        """Images of every rank in a step."""
        return tuple(self.block_rows * len(self.blocks(step, rank)) for rank in range(self.world_size))


def step_batches(
    shard: Any, move_cursor: Callable[[Segment], None], shares: Shares, *, first_step: int, last_step: int
) -> Iterator[StepBatch]:
    """Batches of steps [first, last) for one rank.

    Args:
        shard: This rank's split of the stream; each iteration of it starts one execution, on all ranks together.
        move_cursor: Chooses the units of the next execution; does something on rank 0 only.
        shares: This rank's place.
        first_step: Steps already done.
        last_step: Where to stop.

    Raises:
        ClusterError: the stream handed out another unit than the plan has here.
    """
    per_step, per_block = shares.units_per_step, shares.units_per_block
    for segment in segments(
        first_step * per_step,
        last_step * per_step,
        per_step=per_step,
        world_size=shares.world_size,
        max_units=shares.max_units,
        per_block=per_block,
    ):
        move_cursor(segment)
        prefetch = -(-shares.prefetch_units // per_block)
        blocks = iter(shard.iter_batches(batch_size=shares.block_rows, batch_format="numpy", prefetch_batches=prefetch))
        if shares.rank < (segment.start - segment.padded_start) // per_block:
            next(blocks)  # the padding before the first step is less than one block a rank
        for step in range(segment.start // per_step, segment.stop // per_step):
            yield _collect(step, blocks, shares)
        for _ in blocks:  # the padding; running the split to its end lets all ranks start the next one together
            pass


def _collect(step: int, blocks: Iterator[Mapping[str, np.ndarray]], shares: Shares) -> StepBatch:
    started = time.monotonic()
    parts, per_block = [], shares.units_per_block
    for block in shares.blocks(step):
        expected = np.arange(block * per_block, (block + 1) * per_block)
        part = next(blocks, None)
        if part is None or not np.array_equal(part["unit"], np.repeat(expected, shares.unit_rows)):
            got = "the end of the stream" if part is None else f"units {np.unique(part['unit']).tolist()}"
            raise ClusterError(
                f"the stream broke the plan's order at step {step}", got=got, expected=f"units {expected.tolist()}"
            )
        parts.append(part)

    def column(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    rejected, reason = column("rejected_id"), column("reason")
    views = torch.from_numpy(column("views"))
    wait_s = time.monotonic() - started  # putting the units together is part of getting them
    return StepBatch(
        step,
        views,
        column("sample_id"),
        column("epoch"),
        column("use"),
        shares.micro_batches(step),
        shares.images_by_rank(step),
        tuple((int(rejected[i]), int(reason[i])) for i in np.flatnonzero(rejected >= 0)),
        int(column("animated").sum()),
        wait_s,
    )
