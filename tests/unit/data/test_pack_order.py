"""Every row of a source falls into exactly one output shard, whatever its groups are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data import pack_order
from simclr_ray.data.manifest import Manifest, Shard
from simclr_ray.data.pack_order import PackOrder
from simclr_ray.data.plan import Piece

groups = st.lists(st.lists(st.integers(0, 40), max_size=5), min_size=1, max_size=8)


def manifest(shards: list[list[int]]) -> Manifest:
    return Manifest("/data", [Shard(f"{i}.tar", "tar", "", 1, tuple(rows)) for i, rows in enumerate(shards)])


def ids(pieces: list[Piece]) -> list[int]:
    return [
        i for piece in pieces for i in range(piece.first_sample_id, piece.first_sample_id + piece.stop - piece.start)
    ]


@settings(deadline=None)
@given(groups, st.integers(1, 50), st.none() | st.integers(0, 3), st.integers(1, 12))
def test_every_row_is_in_one_shard(shards: list[list[int]], each: int, seed: int | None, run_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_order, "RUN_ROWS", run_rows)
        order = PackOrder(manifest(shards), each, seed=seed)
    found = [list(order.pieces(number)) for number in range(len(order))]
    total = sum(map(sum, shards))
    assert sorted(i for pieces in found for i in ids(pieces)) == list(range(total))
    assert [len(ids(pieces)) for pieces in found] == [each] * (total // each) + [total % each] * (total % each > 0)
    if seed is None:
        assert [i for pieces in found for i in ids(pieces)] == list(range(total))
    first = np.concatenate([[0], np.cumsum([sum(rows) for rows in shards])])
    for piece in (piece for pieces in found for piece in pieces):
        rows = shards[piece.shard]
        assert 0 <= piece.start < piece.stop <= rows[piece.group]
        assert piece.stop - piece.start <= run_rows
        assert piece.first_sample_id == first[piece.shard] + sum(rows[: piece.group]) + piece.start


def test_runs_are_permuted_over_the_whole_source() -> None:
    order = PackOrder(manifest([[64] * 50] * 20), 640, seed=7)
    for number in range(len(order)):
        assert len({piece.shard for piece in order.pieces(number)}) >= 5, "ten runs of twenty shards"
    again = PackOrder(manifest([[64] * 50] * 20), 640, seed=7)
    other = PackOrder(manifest([[64] * 50] * 20), 640, seed=8)
    assert list(order.pieces(3)) == list(again.pieces(3)) != list(other.pieces(3))
