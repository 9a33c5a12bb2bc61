"""`learn.tiles.Kernel` for float32 on CUDA, in Triton: a tile of the similarity matrix never leaves the chip.

`TorchTiles` writes every tile to memory and reads it back some times, which on a GPU costs about as much as its
products. Here one program keeps a block of rows, goes through columns and accumulates in registers: sums in one
kernel, the gradient in another that makes the logits again. A launch takes one quadrant (one view of rows against one
view of columns); a mirrored block is launched twice, the second time with rows and columns exchanged, so every
program writes rows of its own: no atomics, and the same bits on every run.

It leaves to `TorchTiles`: other dtypes, temperatures that need the running maximum (`wide`), and computing each pair
within a block once for both of its rows; that would take atomics or another pass over memory.

Invariant: the numbers are those of `TorchTiles` up to rounding, also which of them are NaN. What is not a pair of
negatives (padding, an anchor with itself, an anchor with its positive) is selected away by its place, so that it adds
exactly 0; a NaN projection has its place among the pairs and spreads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from simclr_ray.learn.tiles import ALL_QUADRANTS, LARGEST_PLAIN_LOGIT, RowSums

LARGEST_DIM = 512
"""Most dimensions that the gradient kernel's shared memory has room for (66 KiB), from compute capability 8.0 on."""

# Chosen by what ptxas says for compute capability 9.0: no spills (8 bytes at most) with "ieee" and "tf32x3" alike, and
# with "ieee" and D a multiple of 16 room for two programs on a multiprocessor. One product over all of D would hold its
# operands in registers and spill kilobytes a thread.
_ROWS = 64
_SUM_COLUMNS, _GRADIENT_COLUMNS = 64, 32
_CHUNK = 32
"""Dimensions that a product of rows and columns takes at a time."""
_GRADIENT_NUMBERS = 8192
"""Numbers of a gradient block, rows x dimensions, that stay in registers."""
_WARPS, _STAGES = 8, 2


class TritonTiles:
    """`Kernel` for float32 unit rows of at most `LARGEST_DIM` numbers, on one CUDA device.

    Any strides will do as long as the last dimension is contiguous.
    """

    wide = False

    def __init__(self, temperature: float, *, input_precision: str = "ieee", programs: int = 512) -> None:
        """Prepare for one temperature.

        Args:
            temperature: At least 1/70; `TorchTiles` takes smaller ones.
            input_precision: Of Triton's products: "ieee" is float32 on ordinary cores, "tf32x3" nearly that on tensor
                cores; "tf32" moves logits by 5e-4 / temperature.
            programs: Where blocks of rows are fewer than this, each one's columns are shared out among several
                programs. It has a part in the rounding, so it does not follow the device.
        """
        self._inverse_temperature = 1.0 / temperature
        assert self._inverse_temperature <= LARGEST_PLAIN_LOGIT, (
            f"TritonTiles keeps no running maximum, which temperature {temperature:g} needs: "
            f"it takes temperatures from 1/{LARGEST_PLAIN_LOGIT:g} on, use TorchTiles"
        )
        # exp(s) = 2^(z_i . z_j * scale): a GPU has an instruction for powers of 2.
        self._scale = self._inverse_temperature / math.log(2.0)
        self._precision = input_precision
        self._programs = programs

    def new_sums(self, images: int, like: Tensor) -> RowSums:
        """See `Kernel`."""
        totals = like.new_zeros((3, 2, images), dtype=torch.float64)
        return RowSums(totals, like.new_full((2, images), -math.inf), like.new_zeros((2, 2, images)))

    def add_own(self, rows: Tensor, sums: RowSums) -> None:
        """See `Kernel`."""
        for view, other in ALL_QUADRANTS:
            self._add(rows, view, rows, other, sums, own=True)

    def add_block(
        self, rows: Tensor, columns: Tensor, row_sums: RowSums, column_sums: RowSums | None,
        quadrants: Iterable[tuple[int, int]] = ALL_QUADRANTS,
    ) -> None:  # fmt: skip
        """See `Kernel`."""
        for row_view, column_view in quadrants:
            self._add(rows, row_view, columns, column_view, row_sums, own=False)
            if column_sums is not None:
                self._add(columns, column_view, rows, row_view, column_sums, own=False)

    def own_gradient(self, rows: Tensor, normalizer: Tensor, gradient: Tensor) -> None:
        """See `Kernel`."""
        for view, other in ALL_QUADRANTS:
            self._differentiate(rows[view], rows[other], normalizer[view], normalizer[other], gradient[view], own=True)

    def block_gradient(
        self, rows: Tensor, columns: Tensor, row_normalizer: Tensor, column_normalizer: Tensor,
        row_gradient: Tensor, column_gradient: Tensor | None,
        quadrants: Iterable[tuple[int, int]] = ALL_QUADRANTS,
    ) -> None:  # fmt: skip
        """See `Kernel`."""
        for row_view, column_view in quadrants:
            x, y = rows[row_view], columns[column_view]
            w_x, w_y = row_normalizer[row_view], column_normalizer[column_view]
            self._differentiate(x, y, w_x, w_y, row_gradient[row_view], own=False)
            if column_gradient is not None:
                self._differentiate(y, x, w_y, w_x, column_gradient[column_view], own=False)

    def _add(self, x: Tensor, view: int, y: Tensor, other: int, sums: RowSums, *, own: bool) -> None:
        """Add the pairs of x[view] and y[other] to the sums of x[view]."""
        rows, columns = x[view], y[other]
        n, k, dim = _shape(rows, columns)
        if n == 0 or k == 0:
            return
        row_blocks, shares, span = _share_out(n, k, _ROWS, _SUM_COLUMNS, self._programs)
        cross = view != other
        totals = rows.new_empty((2 if cross else 1, shares, n), dtype=torch.float64)
        hardest = rows.new_empty((shares, n))
        # Triton launches on the current device; on a CPU, interpreted, this does nothing.
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            _sums_kernel[row_blocks, shares](
                rows, columns, totals, hardest, n, k, dim, rows.stride(0), columns.stride(0), span,
                self._scale, self._inverse_temperature,
                CROSS=cross, OWN=own, PRECISION=self._precision, ROWS=_ROWS, COLUMNS=_SUM_COLUMNS, CHUNK=_CHUNK,
                num_warps=_WARPS, num_stages=_STAGES,
            )  # fmt: skip
        sums.totals[int(cross), view].add_(totals[0].sum(dim=0))
        if cross:
            sums.totals[2, view].add_(totals[1].sum(dim=0))
            torch.maximum(sums.hardest[view], hardest.amax(dim=0), out=sums.hardest[view])

    def _differentiate(
        self, rows: Tensor, columns: Tensor, row_w: Tensor, column_w: Tensor, gradient: Tensor, *, own: bool
    ) -> None:
        """Add the gradient through the pairs of `rows` (n, D) and `columns` (k, D) to `gradient` (n, D)."""
        n, k, dim = _shape(rows, columns)
        if n == 0 or k == 0:
            return
        padded = max(_CHUNK, triton.next_power_of_2(dim))
        row_block = min(_ROWS, max(16, _GRADIENT_NUMBERS // padded))  # products take no fewer than 16 rows
        row_blocks, shares, span = _share_out(n, k, row_block, _GRADIENT_COLUMNS, self._programs)
        # At most the size of one view's gradient, or of what `programs` programs hold in registers.
        parts = rows.new_empty((shares, n, dim))
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            _gradient_kernel[row_blocks, shares](
                rows, columns, row_w.contiguous(), column_w.contiguous(), parts, n, k, dim,
                rows.stride(0), columns.stride(0), span, self._scale,
                OWN=own, PRECISION=self._precision, ROWS=row_block, COLUMNS=_GRADIENT_COLUMNS, CHUNK=_CHUNK, DIM=padded,
                num_warps=_WARPS, num_stages=_STAGES,
            )  # fmt: skip
        gradient.add_(parts[0] if shares == 1 else parts.sum(dim=0))


def _shape(rows: Tensor, columns: Tensor) -> tuple[int, int, int]:
    for x in (rows, columns):
        assert x.dtype == torch.float32, f"TritonTiles is for float32 projections, got {x.dtype}"
        assert x.shape[1] <= LARGEST_DIM, f"TritonTiles takes {LARGEST_DIM} dimensions at most, got {x.shape[1]}"
        assert x.shape[1] <= 1 or x.stride(1) == 1, "a projection's numbers must lie side by side"
    return len(rows), len(columns), rows.shape[1]


def _share_out(n: int, k: int, rows: int, columns: int, programs: int) -> tuple[int, int, int]:
    """Blocks of rows, shares of the columns, and columns a share, a multiple of the block: none of it empty."""
    row_blocks, column_blocks = triton.cdiv(n, rows), triton.cdiv(k, columns)
    shares = min(column_blocks, max(1, programs // row_blocks))
    span = triton.cdiv(column_blocks, shares) * columns
    return row_blocks, triton.cdiv(k, span), span


# In the kernels i are a block's rows and j its columns, 64-bit where they are multiplied by a stride. What differs from
# call to call, sizes and where slices begin, is not specialized, or multiples of 16 would be compiled apart. The
# annotations are mypy's; Triton looks them up when it compiles, and refuses names that are not its own.


@triton.jit  # type: ignore[untyped-decorator]
def _products(
    row_starts: tl.tensor, column_starts: tl.tensor, row_valid: tl.tensor, column_valid: tl.tensor, dim: tl.tensor,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """z_i . z_j of a block, (ROWS, COLUMNS)."""
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, dim, CHUNK):
        d = start + tl.arange(0, CHUNK)
        x = tl.load(row_starts[:, None] + d[None, :], mask=row_valid[:, None] & (d < dim)[None, :], other=0.0)
        y = tl.load(column_starts[:, None] + d[None, :], mask=column_valid[:, None] & (d < dim)[None, :], other=0.0)
        products = tl.dot(x, y.T, products, input_precision=PRECISION)
    return products


@triton.jit(do_not_specialize=["n", "k", "span"])  # type: ignore[untyped-decorator]
def _sums_kernel(
    rows: tl.tensor, columns: tl.tensor, totals: tl.tensor, hardest: tl.tensor, n: tl.tensor, k: tl.tensor,
    dim: tl.tensor, row_stride: tl.tensor, column_stride: tl.tensor, span: tl.tensor, scale: tl.tensor,
    inverse_temperature: tl.tensor,
    CROSS: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """One block of rows against one share of the columns; `totals` (1 or 2, shares, n), `hardest` (shares, n)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_starts = rows + i.to(tl.int64) * row_stride
    # In float64, as over all columns of a large batch float32 sums would drift.
    total = tl.zeros((ROWS,), tl.float64)
    times_product = tl.zeros((ROWS,), tl.float64)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, min(first + span, k), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        column_starts = columns + j.to(tl.int64) * column_stride
        product = _products(row_starts, column_starts, i < n, j < k, dim, PRECISION, ROWS, COLUMNS, CHUNK)
        negative = (j < k)[None, :]
        if OWN:
            negative = negative & (i[:, None] != j[None, :])
        term = tl.where(negative, tl.exp2(product * scale), 0.0)
        total += tl.sum(term, axis=1)
        if CROSS:
            times_product += tl.sum(tl.where(negative, term * product, 0.0), axis=1)
            largest = tl.maximum(largest, tl.max(tl.where(negative, product, float("-inf")), axis=1))
    at = tl.program_id(1).to(tl.int64) * n + i
    tl.store(totals + at, total, mask=i < n)
    if CROSS:
        second = tl.num_programs(1).to(tl.int64) * n
        tl.store(totals + second + at, times_product * inverse_temperature, mask=i < n)
        # A GPU's maximum passes over NaN; the sum has met the same logits and has kept it.
        largest = tl.where(total == total, largest * inverse_temperature, float("nan"))
        tl.store(hardest + at, largest, mask=i < n)


@triton.jit(do_not_specialize=["row_w", "column_w", "n", "k", "span"])  # type: ignore[untyped-decorator]
def _gradient_kernel(
    rows: tl.tensor, columns: tl.tensor, row_w: tl.tensor, column_w: tl.tensor, gradient: tl.tensor, n: tl.tensor,
    k: tl.tensor, dim: tl.tensor, row_stride: tl.tensor, column_stride: tl.tensor, span: tl.tensor, scale: tl.tensor,
    OWN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr,
) -> None:  # fmt: skip
    """One block of rows against one share of the columns; `gradient` (shares, n, dim), DIM is dim or more."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    row_starts = rows + i.to(tl.int64) * row_stride
    w_i = tl.load(row_w + i, mask=i < n, other=0.0)
    total = tl.zeros((ROWS, DIM), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, min(first + span, k), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        column_starts = columns + j.to(tl.int64) * column_stride
        product = _products(row_starts, column_starts, i < n, j < k, dim, PRECISION, ROWS, COLUMNS, CHUNK)
        w_j = tl.load(column_w + j, mask=j < k, other=0.0)
        negative = (j < k)[None, :]
        if OWN:
            negative = negative & (i[:, None] != j[None, :])
        weight = tl.where(negative, tl.exp2(product * scale) * (w_i[:, None] + w_j[None, :]), 0.0)
        y = tl.load(column_starts[:, None] + d[None, :], mask=(j < k)[:, None] & (d < dim)[None, :], other=0.0)
        total = tl.dot(weight, y, total, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * n + i)[:, None] * dim + d[None, :]
    tl.store(gradient + at, total, mask=(i < n)[:, None] & (d < dim)[None, :])
