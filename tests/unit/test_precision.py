"""Products stay float32's for as long as anyone needs it, and the program's setting comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from simclr_ray.precision import full_precision_products

BACKENDS: Any = torch.backends
pytestmark = pytest.mark.skipif(not hasattr(BACKENDS.cuda.matmul, "fp32_precision"), reason="a torch before 2.9")


def precisions() -> tuple[str, str]:
    return BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision


FULL, PROGRAMS = ("ieee", "ieee"), ("tf32", "bf16")


@pytest.fixture(autouse=True)
def _lower_precision() -> Iterator[None]:
    """As a program might have set it."""
    before = precisions()
    BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision = PROGRAMS
    yield
    BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision = before


def test_the_setting_is_full_inside_and_comes_back_also_after_an_error() -> None:
    with full_precision_products():
        assert precisions() == FULL
        with full_precision_products():
            assert precisions() == FULL
        assert precisions() == FULL
    assert precisions() == PROGRAMS
    with pytest.raises(ZeroDivisionError), full_precision_products():
        raise ZeroDivisionError
    assert precisions() == PROGRAMS


def test_those_who_overlap_may_leave_in_any_order() -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(full_precision_products())
    second.enter_context(full_precision_products())
    first.close()
    assert precisions() == FULL  # the second one is still inside
    second.close()
    assert precisions() == PROGRAMS


def test_threads_that_come_and_go_never_see_less_nor_leave_it_behind() -> None:
    together = threading.Barrier(4)

    def work(number: int) -> set[tuple[str, str]]:
        together.wait(timeout=30)
        seen = set()
        for _ in range(300):
            with full_precision_products():
                seen.add(precisions())
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert all(seen == {FULL} for seen in pool.map(work, range(4)))
    assert precisions() == PROGRAMS
