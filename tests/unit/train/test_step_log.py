"""Stragglers, collapse and rejected images: what is told of the numbers of a record."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.configure import load_config
from simclr_ray.train.run import RunFolder
from simclr_ray.train.step_log import Position, StepLog, TooManyRejectedError, collapse, is_straggler


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


def log(step: int, rejected: int, *, window: int = 1000, samples: int = 5000) -> StepLog:
    """Of a rank that writes no file, at `step` of batches of 100 images."""
    config = load_config(
        {"train": {"global_batch": 100}, "data": {"rejected_window": window, "max_rejected_fraction": 0.1}}
    )
    return StepLog(
        config, cast(Any, SimpleNamespace(samples=samples)), RunFolder("/nowhere"), None,
        rank=1, device=torch.device("cpu"), attempt=1, start=Position(step, rejected, 0),
    )  # fmt: skip


def test_row_13_too_many_rejected_are_found_before_the_window_is_full_and_never_too_early() -> None:
    one = log(0, 0)
    for _ in range(2):
        one._refuse_rejected(100, 50)  # 100 in all: a tenth of the window, if all others are good
    with pytest.raises(TooManyRejectedError, match="101 of the last 300"):
        one._refuse_rejected(100, 1)


def test_row_13_what_earlier_attempts_rejected_counts() -> None:
    """Attempts shorter than the window would otherwise never be judged."""
    before = log(9, 90)
    before._refuse_rejected(100, 10)
    with pytest.raises(TooManyRejectedError, match="102 of the last 1000"):
        log(9, 91)._refuse_rejected(100, 11)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(0, 40))
def test_row_13_a_restart_judges_as_the_undisturbed_run_while_the_window_is_not_full(
    rejected: list[int], at: int
) -> None:
    def ends(parts: list[int], one: StepLog) -> int | None:
        for index, bad in enumerate(parts):
            try:
                one._refuse_rejected(100, bad)
            except TooManyRejectedError:
                return index
        return None

    at = min(at, len(rejected))
    whole = ends(rejected, log(0, 0, window=10_000))
    if whole is None or whole >= at:
        again = ends(rejected[at:], log(at, sum(rejected[:at]), window=10_000))
        assert (None if again is None else at + again) == whole
