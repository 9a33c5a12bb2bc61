"""Stragglers: who keeps the others waiting."""

from __future__ import annotations

import pytest

from simclr_ray.train.step_log import is_straggler


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ([5.0], False),  # alone, nobody waits for it
        ([0.2, 0.3], False),  # a wait that does not matter
        ([4.0, 4.5, 5.0], False),  # all wait: the stream is slow, not a rank
        ([0.1, 5.0], True),
        ([0.1, 0.2, 0.1, 1.5], True),
    ],
)
def test_row_43_one_rank_that_waits_far_longer_than_the_others_is_a_straggler(
    waits: list[float], expected: bool
) -> None:
    assert is_straggler(waits, 10.0) is expected
    assert is_straggler(waits[::-1], 10.0) is expected
