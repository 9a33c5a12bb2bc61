"""Matrix products of float32 that are float32's, whatever the program around has allowed them to be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Inside, neither TF32 nor bfloat16 stands in for float32 in a product, on GPUs and on CPUs that could.

    torch has no such switch for one product. The setting is the process's and is put back at the end; a product that
    another thread makes meanwhile is as precise. It is read when a product is called, not when a GPU computes it.
    """
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        # torch refuses its older switch where a program has used these.
        backends: Any = torch.backends
        places = (backends.cuda.matmul, backends.mkldnn.matmul)
        before = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, precision in zip(places, before, strict=True):
                place.fp32_precision = precision
    else:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
