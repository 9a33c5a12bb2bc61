"""The plan: which samples step k holds, as pure arithmetic over (manifest, seed).

A unit is exactly R rows that are read together. Epoch e is a permutation of all units; the endless concatenation of
epochs is cut into steps of U = B / R units, so step k holds units [kU, (k+1)U) whoever reads them. Nothing here knows
ranks except `share`, which says how a step's units, or blocks of them, fall on them: the j-th goes to rank j mod W, so
any W from 1 to U works, also one that does not divide U, and a resume deals every unit as the undisturbed run would
have.

No I/O, no Ray, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.philox import UInt32Array, key_of, philox4x32

#: Last counter word of the plan's random numbers. Views use small numbers there, so no address is used twice.
UNIT_DOMAIN, ROW_DOMAIN, PACK_DOMAIN = 0x8000_0001, 0x8000_0002, 0x8000_0003
#: Units tried in place of one that cannot be read. More in a row are no accident, but a data set that is gone.
STAND_INS = 8
_NUMBERED, _SORTED = 1 << 17, 1 << 19
"""Items of a permutation that get their random numbers, or are sorted, together: bounds temporaries, not the result."""


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
    number: int
    """Of the unit in its table."""
    rows: int
    seed: int

    @property
    def order(self) -> UInt32Array:
        """Permutation of the unit's rows, uint32 (R,)."""
        return row_order(self.rows, seed=self.seed, epoch=self.epoch, unit=self.number)


class UnitTable:
    """The units of a manifest, without order: full pieces of R rows, then remainders packed into shared units.

    Only two sums a shard are kept; a unit is found by bisection among them, and then among its shard's groups.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Count the units of every shard."""
        self.unit_rows = manifest.unit_rows
        self._shards = manifest.table
        self._full_ends = np.cumsum(self._shards.sums_by_shard(lambda rows: rows // self.unit_rows))
        self._left_ends = np.cumsum(self._shards.sums_by_shard(lambda rows: rows % self.unit_rows))
        self._num_full = int(self._full_ends[-1]) if len(self._shards) else 0
        left = int(self._left_ends[-1]) if len(self._shards) else 0
        shared, self.rows_left_out = divmod(left, self.unit_rows)
        self.num_units = self._num_full + shared

    def pieces(self, unit: int) -> tuple[Piece, ...]:
        """Where the rows of a unit (0 <= unit < num_units) are; one piece for all but the shared units."""
        assert 0 <= unit < self.num_units, unit
        if unit < self._num_full:
            shard, nth = _bisect(self._full_ends, unit)
            group, nth = _bisect(np.cumsum(self._shards.groups_of(shard) // self.unit_rows), nth)
            return (self._piece(shard, group, nth * self.unit_rows, self.unit_rows),)
        first = (unit - self._num_full) * self.unit_rows
        return tuple(self._shared_pieces(first, first + self.unit_rows))

    def _shared_pieces(self, first: int, last: int) -> Iterator[Piece]:
        """Rows [first, last) of the remainders of all groups, laid end to end."""
        while first < last:
            shard, nth = _bisect(self._left_ends, first)
            groups = self._shards.groups_of(shard)
            left = groups % self.unit_rows
            group, nth = _bisect(np.cumsum(left), nth)
            rows = min(last - first, int(left[group]) - nth)
            yield self._piece(shard, group, int(groups[group] - left[group]) + nth, rows)
            first += rows

    def _piece(self, shard: int, group: int, start: int, rows: int) -> Piece:
        before = int(self._shards.groups_of(shard)[:group].sum(dtype=np.int64)) + start
        return Piece(shard, group, start, start + rows, int(self._shards.first_rows[shard]) + before)


def _bisect(ends: np.ndarray, number: int) -> tuple[int, int]:
    """Which of the consecutive runs with these ends item `number` falls into, and its place there."""
    index = int(np.searchsorted(ends, number, side="right"))
    return index, number - (int(ends[index - 1]) if index else 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """The endless sequence of units of one manifest and seed."""

    units: UnitTable
    seed: int

    def unit(self, index: int) -> PlannedUnit:
        """Unit j of the endless plan."""
        epoch, position = divmod(index, self.units.num_units)
        number = int(_unit_order(self.units.num_units, self.seed, epoch)[position])
        return PlannedUnit(index, epoch, self.units.pieces(number), number, self.units.unit_rows, self.seed)


def stand_ins(index: int, num_units: int) -> list[int]:
    """The units of the plan that stand in for unit `index` where it cannot be read, the first readable one wins.

    They are the next ones of its epoch, around its end. A function of the plan alone: whichever rank or task meets
    the unit, and however many there are, the same one takes its place.
    """
    first = index - index % num_units
    return [first + (index + distance) % num_units for distance in range(1, min(STAND_INS, num_units - 1) + 1)]


def row_order(rows: int, *, seed: int, epoch: int, unit: int) -> UInt32Array:
    """Permutation of the rows of a unit in an epoch, uint32 (R,)."""
    return permutation(rows, seed=seed, epoch=epoch, unit=unit, domain=ROW_DOMAIN)


@lru_cache(maxsize=2)
def _unit_order(num_units: int, seed: int, epoch: int) -> UInt32Array:
    """Cached, because a run of consecutive units asks for the same one or two epochs again and again."""
    return permutation(num_units, seed=seed, epoch=epoch, unit=0, domain=UNIT_DOMAIN)


def permutation(n: int, *, seed: int, epoch: int, unit: int, domain: int) -> UInt32Array:
    """Random order of n items, a function of its address alone: items sorted by 64 random bits each.

    Sorting our own counter-based numbers, rather than asking a library generator to shuffle, keeps the order the
    same across numpy versions. Two items tie with probability n^2 / 2^65; the sort is stable, so even then the order
    is defined.

    Memory: 8 bytes an item and some tens of MB. The upper halves of the random numbers are kept, and sorted a range
    of values at a time; lower halves are made again for the few items whose upper halves are equal.

    Returns:
        uint32 (n,), for n up to 2^32.
    """
    assert 0 <= n <= 1 << 32, n
    key, address = key_of(seed), np.array([unit, epoch, domain], dtype=np.uint32)

    def words(items: np.ndarray) -> UInt32Array:
        counter = np.empty((len(items), 4), dtype=np.uint32)
        counter[:, 0], counter[:, 1:] = items, address
        return philox4x32(counter, key)

    high = np.empty(n, dtype=np.uint32)
    for start in range(0, n, _NUMBERED):
        stop = min(n, start + _NUMBERED)
        high[start:stop] = words(np.arange(start, stop, dtype=np.uint32))[:, 0]
    order = np.empty(n, dtype=np.uint32)
    ranges = -(-n // _SORTED)
    filled = 0
    for number in range(ranges):
        first, last = (number << 32) // ranges, (((number + 1) << 32) // ranges) - 1
        items = _within(high, first, last)
        keys = high[items]
        by_key = np.argsort(keys, kind="stable")
        items, keys = items[by_key], keys[by_key]
        equal = np.concatenate([[False], keys[1:] == keys[:-1], [False]])
        tied = np.flatnonzero(equal[1:] | equal[:-1])
        if len(tied):
            items[tied] = items[tied][np.lexsort((words(items[tied])[:, 1], keys[tied]))]
        order[filled : filled + len(items)] = items
        filled += len(items)
    return order


def _within(values: UInt32Array, first: int, last: int) -> np.ndarray:
    """Where values from `first` to `last` are, in order."""
    found = []
    for start in range(0, len(values), _SORTED):
        some = values[start : start + _SORTED]
        found.append(start + np.flatnonzero((some >= first) & (some <= last)))
    return np.concatenate(found)


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


def units_per_block(per_micro_batch: int, *, fewest: int, workers: int, most: int) -> int:
    """How many consecutive units d are dealt together: the most that change nothing for the slowest of the workers.

    Dealing costs Ray the same for a block of any size. d divides the micro-batch, so that each begins with a block;
    each worker has one in it, and the one that has most has no more than if single units were dealt: for every number
    of workers that an elastic group may come to, for another share is another step time and another memory.

    Args:
        per_micro_batch: Units of a micro-batch.
        fewest: As many workers as there are at least; the same as `workers` where the group is not elastic.
        workers: As many as there should be, W.
        most: A bound, such as what fits in memory.
    """
    for per_block in range(min(most, per_micro_batch // workers), 1, -1):
        blocks, rest = divmod(per_micro_batch, per_block)
        if not rest and all(
            -(-blocks // some) * per_block == -(-per_micro_batch // some) for some in range(fewest, workers + 1)
        ):
            return per_block
    return 1


def segments(
    first_unit: int, last_unit: int, *, per_step: int, world_size: int, max_units: int, per_block: int = 1
) -> list[Segment]:
    """Cut units [first, last) into executions of whole steps, each padded to a block for every rank.

    Ray Data deals an execution's blocks from rank 0 on and drops what does not divide. With padding at both ends block
    j always falls to rank j mod W, and nothing that carries a step is dropped; the padding is read by nobody.
    """
    assert first_unit % per_step == last_unit % per_step == per_step % per_block == 0
    round_of_ranks = world_size * per_block
    steps_each = max(1, max_units // per_step)
    out = []
    for start in range(first_unit, last_unit, steps_each * per_step):
        stop = min(last_unit, start + steps_each * per_step)
        out.append(Segment(start - start % round_of_ranks, start, stop, stop + -stop % round_of_ranks))
    return out


def share(step: int, rank: int, *, per_step: int, world_size: int) -> range:
    """Blocks of a step that fall on a rank, in the order in which the split hands them out; a block may be a unit."""
    first, last = step * per_step, (step + 1) * per_step
    return range(first + (rank - first) % world_size, last, world_size)
