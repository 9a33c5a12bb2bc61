"""The plan: which samples step k holds, as pure arithmetic over (manifest, seed).

A unit is exactly R rows that are read together. Epoch e is a permutation of all units; the endless concatenation of
epochs is cut into steps of U = B / R units, so step k holds units [kU, (k+1)U) whoever reads them. Nothing here
knows ranks except `share`, which says how a step's units fall on them: unit j goes to rank j mod W, so any W from 1
to U works, also one that does not divide U, and a resume deals every unit as the undisturbed run would have.

No I/O, no Ray, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.philox import key_of, philox4x32

#: Last counter word of the plan's random numbers. Views use small numbers there, so no address is used twice.
UNIT_DOMAIN, ROW_DOMAIN, PACK_DOMAIN = 0x8000_0001, 0x8000_0002, 0x8000_0003


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one row group."""

    shard: int
    group: int
    start: int
    stop: int
    first_sample_id: int
    """Id of the row at `start`."""


@dataclass(frozen=True)
class PlannedUnit:
    """What one unit of the endless plan holds."""

    index: int
    """Position j in the endless plan."""
    epoch: int
    pieces: tuple[Piece, ...]
    order: np.ndarray
    """Permutation of the unit's rows, int64 (R,)."""


class UnitTable:
    """The units of a manifest, without order: full pieces of R rows, then remainders packed into shared units."""

    def __init__(self, manifest: Manifest) -> None:
        """Cut every row group into units. Memory: 12 bytes a unit."""
        self.unit_rows = manifest.unit_rows
        self._first_ids = manifest.first_sample_ids()
        self._rows_per_group = [np.asarray(shard.rows_per_group, dtype=np.int64) for shard in manifest.shards]
        counts = [len(groups) for groups in self._rows_per_group]
        rows = np.concatenate([*self._rows_per_group, np.zeros(0, np.int64)])
        shard = np.repeat(np.arange(len(counts)), counts)
        group = np.concatenate([*(np.arange(count) for count in counts), np.zeros(0, np.int64)])

        full = rows // self.unit_rows
        which = np.repeat(np.arange(len(rows)), full)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(full) - full, full)
        self._shard = shard[which].astype(np.int32)
        self._group = group[which].astype(np.int32)
        self._start = (nth * self.unit_rows).astype(np.int32)

        left = np.flatnonzero(rows % self.unit_rows)
        self._left_shard, self._left_group = shard[left], group[left]
        self._left_start = (rows - rows % self.unit_rows)[left]
        self._left_ends = np.cumsum(rows[left] % self.unit_rows)
        total_left = int(self._left_ends[-1]) if len(left) else 0
        shared, self.rows_left_out = divmod(total_left, self.unit_rows)
        self._num_full = len(self._shard)
        self.num_units = self._num_full + shared

    def pieces(self, unit: int) -> tuple[Piece, ...]:
        """Where the rows of a unit (0 <= unit < num_units) are; one piece for all but the shared units."""
        assert 0 <= unit < self.num_units, unit
        if unit < self._num_full:
            return (self._piece(self._shard[unit], self._group[unit], self._start[unit], self.unit_rows),)
        first = (unit - self._num_full) * self.unit_rows
        return tuple(self._shared_pieces(first, first + self.unit_rows))

    def _shared_pieces(self, first: int, last: int) -> Iterator[Piece]:
        index = int(np.searchsorted(self._left_ends, first, side="right"))
        while first < last:
            begin = int(self._left_ends[index - 1]) if index else 0
            stop = min(last, int(self._left_ends[index]))
            start = int(self._left_start[index]) + first - begin
            yield self._piece(self._left_shard[index], self._left_group[index], start, stop - first)
            first, index = stop, index + 1

    def _piece(self, shard: int, group: int, start: int, rows: int) -> Piece:
        before = int(self._rows_per_group[shard][:group].sum()) + int(start)
        first_id = int(self._first_ids[shard]) + before
        return Piece(int(shard), int(group), int(start), int(start) + int(rows), first_id)


@dataclass(frozen=True, eq=False)
class Plan:
    """The endless sequence of units of one manifest and seed."""

    units: UnitTable
    seed: int

    def unit(self, index: int) -> PlannedUnit:
        """Unit j of the endless plan."""
        epoch, position = divmod(index, self.units.num_units)
        unit = int(self._epoch_order(epoch)[position])
        order = permutation(self.units.unit_rows, seed=self.seed, epoch=epoch, unit=unit, domain=ROW_DOMAIN)
        return PlannedUnit(index, epoch, self.units.pieces(unit), order)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return _unit_order(self.units.num_units, self.seed, epoch)


@lru_cache(maxsize=2)
def _unit_order(num_units: int, seed: int, epoch: int) -> np.ndarray:
    """Cached, because a run of consecutive units asks for the same one or two epochs again and again."""
    return permutation(num_units, seed=seed, epoch=epoch, unit=0, domain=UNIT_DOMAIN)


def permutation(n: int, *, seed: int, epoch: int, unit: int, domain: int) -> np.ndarray:
    """Random order of n items, a function of its address alone: items sorted by 64 random bits each.

    Sorting our own counter-based numbers, rather than asking a library generator to shuffle, keeps the order the
    same across numpy versions. Two items tie with probability n^2 / 2^65; the sort is stable, so even then the order
    is defined.

    Returns:
        int64 (n,).
    """
    keys = np.empty(n, dtype=np.uint64)
    key = key_of(seed)
    for start in range(0, n, 1 << 20):  # pieces, so that 10^7 units do not cost gigabytes of temporaries
        stop = min(n, start + (1 << 20))
        counter = np.empty((stop - start, 4), dtype=np.uint32)
        counter[:, 0] = np.arange(start, stop, dtype=np.uint32)
        counter[:, 1:] = np.array([unit, epoch, domain], dtype=np.uint32)
        words = philox4x32(counter, key)
        keys[start:stop] = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]
    return np.argsort(keys, kind="stable")


def units_per_step(global_batch: int, unit_rows: int) -> int:
    """U = B / R.

    Raises:
        ConfigError: when R does not divide B.
    """
    units, left = divmod(global_batch, unit_rows)
    if left or not units:
        near = sorted({max(units, 1) * unit_rows, max(units + 1, 2) * unit_rows})
        raise ConfigError(
            f"must be a multiple of the data set's {unit_rows} rows a unit",
            where="train.global_batch",
            got=global_batch,
            fix=f"use {' or '.join(map(str, near))}",
        )
    return units


def units_per_micro_batch(micro_batch: int | None, per_step: int, unit_rows: int) -> int:
    """Units that go through the encoder together, over all ranks: all U of a step, or those of `micro_batch` images.

    Raises:
        ConfigError: when the step does not fall into equal micro-batches of whole units.
    """
    if micro_batch is None:
        return per_step
    units, left = divmod(micro_batch, unit_rows)
    if left or not units or per_step % units:
        valid = [u * unit_rows for u in range(1, per_step + 1) if per_step % u == 0]
        near = sorted(sorted(valid, key=lambda images: abs(images - micro_batch))[:2])
        raise ConfigError(
            f"the global batch of {per_step * unit_rows} images does not fall into micro-batches of this size, "
            f"each of whole units of {unit_rows}",
            where="train.micro_batch",
            got=micro_batch,
            fix=f"use {' or '.join(map(str, near))}",
        )
    return units


@dataclass(frozen=True)
class Segment:
    """One execution of the stream: units [start, stop) carry steps, those around them only even out the split."""

    padded_start: int
    start: int
    stop: int
    padded_stop: int


def segments(first_unit: int, last_unit: int, *, per_step: int, world_size: int, max_units: int) -> list[Segment]:
    """Cut units [first, last) into executions of whole steps, each padded to multiples of the world size.

    Ray Data deals an execution's blocks from rank 0 on and drops what does not divide. With padding at both ends unit j
    always falls to rank j mod W, and nothing that carries a step is dropped; the padding is read by nobody.
    """
    assert first_unit % per_step == last_unit % per_step == 0
    steps_each = max(1, max_units // per_step)
    out = []
    for start in range(first_unit, last_unit, steps_each * per_step):
        stop = min(last_unit, start + steps_each * per_step)
        out.append(Segment(start - start % world_size, start, stop, stop + -stop % world_size))
    return out


def share(step: int, rank: int, *, per_step: int, world_size: int) -> range:
    """Units of a step that fall on a rank, in the order in which the split hands them out."""
    first, last = step * per_step, (step + 1) * per_step
    return range(first + (rank - first) % world_size, last, world_size)
