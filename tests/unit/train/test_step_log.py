"""Stragglers and collapse: what is told of the numbers of a record."""

from __future__ import annotations

import pytest
import torch

from simclr_ray.train.step_log import collapse, is_straggler


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


def test_row_41_collapse_is_told_of_projections_that_all_point_the_same_way() -> None:
    one = torch.ones(1, 16)
    collapsed = one + 1e-3 * torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    healthy = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for projections, expected in ((collapsed, True), (healthy, False)):
        unit = torch.nn.functional.normalize(projections, dim=1)
        similarities = unit @ unit.T
        negative = float((similarities.sum() - similarities.trace()) / (32 * 31))
        assert (collapse(7, negative) is not None) is expected
    assert "at step 7" in str(collapse(7, 0.995))
