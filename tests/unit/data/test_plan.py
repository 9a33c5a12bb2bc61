"""Laws of the plan: a permutation an epoch, disjoint over ranks, the same for every number of workers."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data.manifest import Manifest, Shard
from simclr_ray.data.plan import (
    STAND_INS,
    Piece,
    Plan,
    UnitTable,
    permutation,
    segments,
    share,
    stand_ins,
    units_per_step,
)
from simclr_ray.errors import ConfigError
from simclr_ray.philox import key_of, philox4x32

R = 4


def manifest_of(groups: list[list[int]], unit_rows: int = R) -> Manifest:
    shards = tuple(Shard(f"s{i}", "parquet", "e", 1, tuple(rows)) for i, rows in enumerate(groups))
    return Manifest("/nowhere", shards, unit_rows=unit_rows)


shard_sizes = st.lists(st.lists(st.integers(1, 3 * R), max_size=4), min_size=1, max_size=5)


def ids_of(plan: Plan, unit: int) -> list[int]:
    """Sample ids of a unit in planned order, as the reader would see them."""
    planned = plan.unit(unit)
    stored = [i for p in planned.pieces for i in range(p.first_sample_id, p.first_sample_id + p.stop - p.start)]
    return [stored[i] for i in planned.order]


@settings(deadline=None)
@given(shard_sizes)
def test_units_cover_every_sample_once_but_for_less_than_one_unit(groups: list[list[int]]) -> None:
    manifest = manifest_of(groups)
    table = UnitTable(manifest)
    pieces = [p for unit in range(table.num_units) for p in table.pieces(unit)]
    seen = [i for p in pieces for i in range(p.first_sample_id, p.first_sample_id + p.stop - p.start)]
    assert len(set(seen)) == len(seen) == table.num_units * R
    assert manifest.rows - len(seen) == table.rows_left_out < R
    for p in pieces:
        assert 0 <= p.start < p.stop <= groups[p.shard][p.group]
        before = sum(map(sum, groups[: p.shard])) + sum(groups[p.shard][: p.group])
        assert p.first_sample_id == before + p.start


def units_one_by_one(groups: list[list[int]], unit_rows: int) -> list[list[Piece]]:
    """The obvious twin of `UnitTable`: every row of every unit in a list, runs of neighbours made pieces at the end."""
    full, left, first_id = [], [], 0
    for shard, rows_per_group in enumerate(groups):
        for group, rows in enumerate(rows_per_group):
            places = [(shard, group, row, first_id + row) for row in range(rows)]
            whole = rows - rows % unit_rows
            full += [places[start : start + unit_rows] for start in range(0, whole, unit_rows)]
            left += places[whole:]
            first_id += rows
    shared = [left[start : start + unit_rows] for start in range(0, len(left) - unit_rows + 1, unit_rows)]
    units = []
    for unit in full + shared:
        pieces: list[Piece] = []
        for _, run in itertools.groupby(unit, key=lambda place: place[:2]):
            rows = list(run)
            pieces.append(Piece(*rows[0][:3], rows[-1][2] + 1, rows[0][3]))
        units.append(pieces)
    return units


some_groups = st.lists(st.lists(st.integers(0, 3 * R), max_size=6), max_size=8)


@settings(deadline=None)
@given(some_groups, st.integers(1, 9))
def test_units_are_those_of_the_twin_that_lists_every_row(groups: list[list[int]], unit_rows: int) -> None:
    """Empty shards, empty groups and units over many groups among them."""
    table = UnitTable(manifest_of(groups, unit_rows))
    assert [list(table.pieces(unit)) for unit in range(table.num_units)] == units_one_by_one(groups, unit_rows)


@settings(deadline=None)
@given(shard_sizes, st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_an_epoch_is_a_permutation_of_all_units(groups: list[list[int]], seed: int, epoch: int) -> None:
    table = UnitTable(manifest_of(groups))
    if not table.num_units:
        return
    plan = Plan(table, seed)
    first = epoch * table.num_units
    seen = [i for unit in range(first, first + table.num_units) for i in ids_of(plan, unit)]
    unordered = [i for unit in range(table.num_units) for p in table.pieces(unit)
                 for i in range(p.first_sample_id, p.first_sample_id + p.stop - p.start)]  # fmt: skip
    assert sorted(seen) == sorted(unordered)
    assert all(plan.unit(unit).epoch == epoch for unit in range(first, first + table.num_units))


def test_epochs_and_seeds_differ_in_order() -> None:
    table = UnitTable(manifest_of([[R] * 50]))
    orders = [
        tuple(Plan(table, seed).unit(epoch * 50 + i).pieces[0].group for i in range(50))
        for seed, epoch in itertools.product((0, 1, 2**62), (0, 1))
    ]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 300_000, 1_100_000])
def test_a_permutation_sorts_all_64_bits(n: int) -> None:
    """At 300,000 items some ten pairs share the upper half of their random number; the last size is sorted in parts."""
    counter = np.zeros((n, 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1:] = np.arange(n), (5, 2, 9)
    words = philox4x32(counter, key_of(77)).astype(np.uint64)
    twin = np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")
    if n >= 300_000:
        assert len(np.unique(words[:, 0])) < n, "there are ties"
    ours = permutation(n, seed=77, unit=5, epoch=2, domain=9)
    assert ours.dtype == np.uint32
    np.testing.assert_array_equal(ours, twin)


@given(st.integers(1, 40), st.integers(0, 4), st.data())
def test_others_of_the_epoch_stand_in_for_a_unit(num_units: int, epoch: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, num_units - 1))
    others = stand_ins(epoch * num_units + position, num_units)
    assert len(others) == len(set(others)) == min(STAND_INS, num_units - 1)
    assert epoch * num_units + position not in others
    for distance, other in enumerate(others, start=1):
        assert other // num_units == epoch
        assert other % num_units == (position + distance) % num_units


def test_permutation_is_uniform() -> None:
    """Chi-square of every (place, item) count over many seeds; 24 degrees of freedom, 99.9 % bound 51.2."""
    n, trials = 5, 2000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), permutation(n, seed=seed, epoch=0, unit=0, domain=1)] += 1
    chi_square = ((counts - trials / n) ** 2 / (trials / n)).sum()
    assert chi_square < 51.2


def test_permutation_is_pinned() -> None:
    """The order of a run must not change with a library or a machine, so it is written down here."""
    assert permutation(8, seed=7, epoch=3, unit=0, domain=0x8000_0001).tolist() == [4, 5, 3, 6, 1, 0, 7, 2]


worlds = st.integers(1, 7)


@given(st.integers(0, 9), st.integers(1, 12), st.integers(1, 6), worlds, st.integers(1, 30))
def test_segments_join_without_gap_and_split_evenly(
    first: int, steps: int, per_step: int, world: int, most: int
) -> None:
    cut = segments(first * per_step, (first + steps) * per_step, per_step=per_step, world_size=world, max_units=most)
    assert cut[0].start == first * per_step
    assert cut[-1].stop == (first + steps) * per_step
    for segment, following in itertools.pairwise([*cut, None]):
        assert following is None or following.start == segment.stop
        assert (segment.stop - segment.start) % per_step == 0
        assert segment.padded_start % world == segment.padded_stop % world == 0
        assert 0 <= segment.padded_stop - segment.stop < world
        assert 0 <= segment.start - segment.padded_start < world


@given(st.integers(0, 9), st.integers(1, 12), st.integers(1, 6), worlds, st.integers(1, 30), st.integers(1, 5))
def test_blocks_are_cut_as_single_units_are(
    first: int, steps: int, per_step: int, world: int, most: int, per_block: int
) -> None:
    def cut(d: int) -> list[tuple[int, ...]]:
        found = segments(
            d * first * per_step, d * (first + steps) * per_step,
            per_step=d * per_step, world_size=world, max_units=d * most, per_block=d,
        )  # fmt: skip
        return [astuple(segment) for segment in found]

    assert cut(per_block) == [tuple(per_block * unit for unit in segment) for segment in cut(1)]


@given(st.integers(0, 9), st.integers(1, 6), st.integers(1, 8), st.data())
def test_every_rank_gets_its_round_robin_part_of_every_step(
    first: int, steps: int, per_step: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, per_step))
    (segment,) = segments(
        first * per_step, (first + steps) * per_step, per_step=per_step, world_size=world, max_units=10**6
    )
    blocks = range(segment.padded_start, segment.padded_stop)  # what Ray Data deals from rank 0 on
    dealt = {rank: iter([j for j in blocks[rank::world] if j >= segment.start]) for rank in range(world)}
    for step in range(first, first + steps):
        shares = [share(step, rank, per_step=per_step, world_size=world) for rank in range(world)]
        assert sorted(itertools.chain(*shares)) == list(range(step * per_step, (step + 1) * per_step))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert min(map(len, shares)) >= 1
        for rank, units in enumerate(shares):
            assert list(units) == [next(dealt[rank]) for _ in units]


@settings(max_examples=50)
@given(st.integers(1, 200), worlds, worlds, st.integers(1, 20))
def test_a_resume_on_another_world_size_continues_the_same_steps(
    stop: int, before: int, after: int, per_step: int
) -> None:
    before, after = min(before, per_step), min(after, per_step)
    whole = list(range((stop + 3) * per_step))

    def run(first: int, last: int, world: int) -> list[int]:
        out = []
        for segment in segments(first * per_step, last * per_step, per_step=per_step, world_size=world, max_units=50):
            for step in range(segment.start // per_step, segment.stop // per_step):
                units = [share(step, r, per_step=per_step, world_size=world) for r in range(world)]
                out += sorted(itertools.chain(*units))
        return out

    assert run(0, stop, before) + run(stop, stop + 3, after) == whole


@given(st.integers(0, 200), st.integers(1, 7), st.integers(1, 7), st.integers(0, 6))
def test_a_unit_falls_on_the_same_rank_wherever_its_execution_starts(
    unit: int, per_step: int, world: int, rank: int
) -> None:
    """So a resume, or other segments, change neither a rank's rows nor the order in which gradients are summed."""
    world = min(world, per_step)
    rank %= world
    step = unit // per_step
    assert (unit in share(step, rank, per_step=per_step, world_size=world)) == (unit % world == rank)


@pytest.mark.parametrize(("batch", "near"), [(100, "64 or 128"), (3, "64 or 128"), (200, "192 or 256")])
def test_a_batch_that_is_no_multiple_of_a_unit_is_refused_with_the_nearest(batch: int, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        units_per_step(batch, 64)
