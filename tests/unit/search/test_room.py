"""Places of trials."""

from __future__ import annotations

from simclr_ray.search.room import Room


def test_so_many_trials_have_a_place_and_a_restarted_one_finds_its_own() -> None:
    room = Room(2)
    assert room.take("a")
    assert room.take("b")
    assert not room.take("c")
    assert room.take("a")  # its process was lost, and another one asks
    room.give("a")
    room.give("a")
    assert room.take("c")
    assert not room.take("a")
    room.give("never had one")
    assert not room.take("a")
