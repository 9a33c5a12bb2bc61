"""What falls on a rank, as arithmetic. The stream itself is in tests/integration/test_stream.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.data.plan import share
from simclr_ray.train.batches import Shares


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
