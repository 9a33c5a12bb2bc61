"""Matrix products of float32 that are float32's, whatever the program around has allowed them to be."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Inside, neither TF32 nor bfloat16 stands in for float32 in a product, on GPUs and on CPUs that could.

    torch has no such switch for one product. The setting is the process's: while any thread is inside, the products of
    all are as precise, and the last one out puts back what the first one in found. It is read when a product is called,
    not when a GPU computes it. (What was inherited from `torch.backends.fp32_precision` is set for products after that,
    and no longer follows it.)
    """
    with _FULL_PRECISION.held():
        yield


class _FullPrecision:
    """Counts who needs it, for they leave in any order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._put_back: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._put_back = _set_full_precision()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._put_back()


_FULL_PRECISION: Final = _FullPrecision()


def _set_full_precision() -> Callable[[], None]:
    """Returns what puts back the setting before."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return partial(torch.set_float32_matmul_precision, before)
    # torch refuses its older switch where a program has used these.
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.mkldnn.matmul)
    own = [place.fp32_precision for place in places]
    _set(places, ["ieee"] * len(places))
    return partial(_set, places, own)


def _set(places: tuple[Any, ...], precisions: list[str]) -> None:
    for place, precision in zip(places, precisions, strict=True):
        place.fp32_precision = precision
