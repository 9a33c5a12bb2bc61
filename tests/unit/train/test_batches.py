"""What falls on a rank, as arithmetic. The stream itself is in tests/integration/test_stream.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.data.plan import Segment, units_per_block
from simclr_ray.errors import ClusterError
from simclr_ray.train.batches import Shares, step_batches


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 50))
def test_micro_batches_hold_the_same_units_for_any_number_of_ranks(blocks, per_block, pieces, world_size, step):
    per_micro, unit_rows = blocks * per_block, 16
    per_step = per_micro * pieces
    held: list[set[int]] = [set() for _ in range(pieces)]
    for rank in range(world_size):
        shares = Shares(rank, world_size, per_step, per_micro, unit_rows, 100, 2, per_block)
        mine = [block * per_block + i for block in shares.blocks(step) for i in range(per_block)]
        assert shares.images_by_rank(step)[rank] == unit_rows * len(mine) == sum(shares.micro_batches(step))
        for piece, images in enumerate(shares.micro_batches(step)):
            units, mine = mine[: images // unit_rows], mine[images // unit_rows :]
            held[piece] |= set(units)
            if world_size <= blocks:
                assert units
    first = step * per_step
    assert held == [set(range(first + p * per_micro, first + (p + 1) * per_micro)) for p in range(pieces)]


@given(st.integers(1, 96), st.integers(1, 16), st.integers(0, 15), st.integers(1, 16))
def test_units_are_dealt_together_where_no_worker_has_more_to_do_for_it(per_micro, fewest, more, most):
    workers = fewest + more
    if workers > per_micro:
        return
    per_block = units_per_block(per_micro, fewest=fewest, workers=workers, most=most)
    assert 1 <= per_block <= most
    assert per_micro % per_block == 0

    def images(per_block: int, some: int) -> tuple[int, ...]:
        return Shares(0, some, per_micro, per_micro, 1, 100, 2, per_block).images_by_rank(0)

    for some in range(fewest, workers + 1):
        assert sum(images(per_block, some)) == per_micro
        assert min(images(per_block, some)) > 0
        assert max(images(per_block, some)) == max(images(1, some))
    if per_micro % workers == 0 and not more:  # then what divides a share is a way, and the largest is taken
        share = per_micro // workers
        assert per_block == max(d for d in range(1, min(most, share) + 1) if share % d == 0)


class Split:
    """What a rank iterates over: units in the order they come, as the stage makes them."""

    def __init__(self, units: list[int]) -> None:
        self.units = units

    def iter_batches(self, **_: object):
        for unit in self.units:
            rows = np.arange(4)
            yield {
                "views": np.full((4, 2, 8, 8, 3), unit, dtype=np.uint8), "sample_id": 4 * unit + rows,
                "epoch": 0 * rows, "use": 0 * rows, "unit": np.full(4, unit),
                "rejected_id": np.where(rows == 1, 4 * unit + 1, -1), "reason": np.where(rows == 1, 3, -1),
                "animated": rows >= 4 - unit % 4,
            }  # fmt: skip


SHARES = Shares(0, 1, units_per_step=2, units_per_micro_batch=2, unit_rows=4, max_units=100, prefetch_units=2)


def test_a_batch_is_its_units_in_order_and_counts_what_stands_in_them():
    segments: list[Segment] = []
    batches = list(step_batches(Split([2, 3, 4, 5]), segments.append, SHARES, first_step=1, last_step=3))
    assert [(segment.start, segment.stop) for segment in segments] == [(2, 6)]
    assert [batch.step for batch in batches] == [1, 2]
    assert [batch.sample_ids.tolist() for batch in batches] == [list(range(8, 16)), list(range(16, 24))]
    assert [batch.rejected for batch in batches] == [((9, 3), (13, 3)), ((17, 3), (21, 3))]
    assert [batch.animated for batch in batches] == [2 + 3, 0 + 1]


def test_another_unit_than_the_plan_s_is_an_error():
    with pytest.raises(ClusterError, match=r"broke the plan's order at step 1.*\[5\].*\[3\]"):
        list(step_batches(Split([2, 5]), lambda _: None, SHARES, first_step=1, last_step=2))
