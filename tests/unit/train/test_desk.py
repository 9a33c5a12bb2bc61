"""What all ranks of an attempt are told alike."""

from __future__ import annotations

import pytest

from simclr_ray.errors import DataError
from simclr_ray.train.desk import _Desk


def test_a_group_that_starts_after_a_stop_or_an_error_is_sent_back() -> None:
    stopped, failed = _Desk(attempts=0), _Desk(attempts=0)
    stopped.ask_to_stop()
    failed.fail(DataError("no images"))
    for desk in (stopped, failed):
        assert [desk.join(rank, "node", "first") for rank in (0, 1)] == [False, False]


def test_an_error_that_was_dealt_with_lets_the_next_group_train() -> None:
    desk = _Desk(attempts=0)
    desk.fail(DataError("no images"))
    desk.pardon()
    assert desk.join(0, "node", "first")


@pytest.mark.parametrize("ranks", [[0, 1, 2], [2, 0, 1]])
def test_ranks_that_join_before_and_after_a_stop_are_told_the_same(ranks: list[int]) -> None:
    """Else one rank would wait for another that has gone home."""
    desk = _Desk(attempts=3)
    told = [desk.join(ranks[0], "node", "first")]
    desk.ask_to_stop()
    told += [desk.join(rank, "node", "first") for rank in ranks[1:]]
    assert told == [True, True, True]
    assert [desk.join(rank, "node", "second") for rank in ranks] == [False, False, False]
