"""What falls on a rank, as arithmetic. The stream itself is in tests/integration/test_stream.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.data.plan import Segment, share
from simclr_ray.errors import ClusterError
from simclr_ray.train.batches import Shares, step_batches


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 50))
def test_micro_batches_hold_the_same_units_for_any_number_of_ranks(per_micro, pieces, world_size, step):
    per_step, unit_rows = per_micro * pieces, 16
    held: list[set[int]] = [set() for _ in range(pieces)]
    for rank in range(world_size):
        shares = Shares(rank, world_size, per_step, per_micro, unit_rows, 100, 2)
        mine = list(share(step, rank, per_step=per_step, world_size=world_size))
        assert shares.images_by_rank(step)[rank] == unit_rows * len(mine) == sum(shares.micro_batches(step))
        for piece, images in enumerate(shares.micro_batches(step)):
            units, mine = mine[: images // unit_rows], mine[images // unit_rows :]
            held[piece] |= set(units)
            if world_size <= per_micro:
                assert units
    first = step * per_step
    assert held == [set(range(first + p * per_micro, first + (p + 1) * per_micro)) for p in range(pieces)]


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
    with pytest.raises(ClusterError, match=r"broke the plan's order at step 1.*\[5.*unit 3"):
        list(step_batches(Split([2, 5]), lambda _: None, SHARES, first_step=1, last_step=2))
