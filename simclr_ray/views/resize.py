"""The two resizes that torch has no function for.

`resize_keys`: bicubic as Google's code does it, four pixels each way however much the image shrinks. That is
`tf.image.resize` with `BICUBIC` and without `antialias`, the kernel of R. G. Keys 1981, "Cubic Convolution
Interpolation for Digital Image Processing", with a = -1/2. Torch's bicubic without antialiasing has a = -3/4 and no
switch for it, so the weights are made here. Pixel centres lie at halves; pixels beyond the edge of the crop weigh
nothing, and the rest of the four is scaled to sum to 1.

`resize_reduced`: antialiased, as `F.interpolate` does it for 8-bit pixels, from an image that was decoded at a fraction
of its size. Boxes keep their whole numbers of pixels of the full image, so that all places are exact fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

TAPS: Final = 4
KEYS: Final = -0.5  # the kernel's one free number, a
_FINEST: Final = 15
"""Bits of a weight of `resize_reduced` after the point: with more, its sums would not be exact in float32."""


def resize_keys(pixels: Tensor, size: int) -> Tensor:
    """Resize a crop, rounded to whole levels.

    Args:
        pixels: (H, W, 3) uint8 on the CPU, of any strides.
        size: Side of the result.

    Returns:
        (size, size, 3) uint8, contiguous.
    """
    height, width, channels = pixels.shape
    rows, row_weights = taps(height, size)
    if TAPS * size < height:  # do not turn pixels into floats that no tap reads
        pixels = pixels[rows.flatten()]
        rows = torch.arange(TAPS * size).view(size, TAPS)
    # A weighted sum of four rows of a table is what embedding bags are; theirs is by far torch's fastest kernel for
    # it. Both transpositions are of plain matrices: moving pixels of three channels about takes three times as long.
    table = pixels.reshape(len(pixels), width * channels).float()
    wide = F.embedding_bag(rows, table, mode="sum", per_sample_weights=row_weights)  # (size, W * 3)
    columns, column_weights = taps(width, size)
    columns = (columns[:, None] * channels + torch.arange(channels)[:, None]).flatten(0, 1)  # (size * 3, TAPS)
    column_weights = column_weights.repeat_interleave(channels, dim=0)
    turned = F.embedding_bag(columns, wide.t().contiguous(), mode="sum", per_sample_weights=column_weights)
    levels = turned.t().contiguous().add_(0.5).clamp_(0, 255)
    return levels.to(torch.uint8).view(size, size, channels)


def resize_reduced(
    pixels: Tensor, box: Sequence[int], size: int, reduction: int, interpolation: Literal["bilinear", "bicubic"]
) -> Tensor:
    """Resize a crop of an image that was decoded at a fraction of its size: what the C kernel makes, to the bit.

    Pixels that the box reaches into count as whole ones, the others not at all, as a crop of the full image knows
    nothing of what is beyond its box either. (Taking in the others, or weighing those at the edge by their share in the
    box, changes the mean distance from the full image's crop by less than 1 %.)

    Args:
        pixels: (H, W, 3) uint8 on the CPU: the whole image, reduced.
        box: Top, left, height and width in pixels of the full image.
        size: Side of the result.
        reduction: How many pixels of the full image each side of a pixel stands for.
        interpolation: Its filter.

    Returns:
        (size, size, 3) uint8, contiguous.
    """
    top, left, height, width = box
    rows, columns = (slice(a // reduction, -(-(a + n) // reduction)) for a, n in ((top, height), (left, width)))
    crop = pixels[rows, columns]
    high, wide, channels = crop.shape
    # Across and then down, as torch and Pillow, with the embedding bags and the transpositions of `resize_keys`.
    line = crop.reshape(high, wide * channels).float().t()
    index, weights, precision = filter_taps(left % reduction, width, reduction, size, interpolation)
    index = (index[:, None] * channels + torch.arange(channels)[:, None]).flatten(0, 1)  # (size * 3, taps)
    across = _weigh(line, index, weights.repeat_interleave(channels, dim=0), precision)  # (size * 3, H)
    down = _weigh(across.t(), *filter_taps(top % reduction, height, reduction, size, interpolation))  # (size, size * 3)
    return down.to(torch.int16).to(torch.uint8).view(size, size, channels)  # at once, it takes three times as long


def _weigh(table: Tensor, index: Tensor, weights: Tensor, precision: int) -> Tensor:
    """Sums of the table's rows, whole numbers of at most 24 bits, brought back to levels from 0 to 255."""
    sums = F.embedding_bag(index, table.contiguous(), mode="sum", per_sample_weights=weights)
    return sums.add_(1 << (precision - 1)).mul_(0.5**precision).floor_().clamp_(0, 255)


@lru_cache(maxsize=1024)
def filter_taps(
    before: int, length: int, reduction: int, size: int, interpolation: Literal["bilinear", "bicubic"]
) -> tuple[Tensor, Tensor, int]:
    """Weights of an antialiased resize of a crop that starts and ends at fractions of a pixel; not to be changed.

    Steps and roundings are `make_axis`'s of native.c, in the same order, down to the last bit.

    Args:
        before: Where in its first pixel the crop starts, in parts of `reduction`.
        length: Of the crop, in the same parts.
        reduction: Parts of a pixel.
        size: Pixels of the resized line.
        interpolation: Whether the filter is a triangle or Keys's cubic.

    Returns:
        (size, taps) int64 indices, counted from the crop's first pixel; (size, taps) whole float32 weights; and the
        power of 2 that a row of these sums to.
    """
    pixels = -(-(before + length) // reduction)
    scale = length / (reduction * size)
    stretch = max(scale, 1.0)
    support = stretch if interpolation == "bilinear" else 2.0 * stretch
    centre = before / reduction + scale * (np.arange(size) + 0.5)
    first = (centre - support + 0.5).astype(np.int64).clip(0, None)  # towards zero, as C does
    last = (centre + support + 0.5).astype(np.int64).clip(None, pixels)
    index = first[:, None] + np.arange((last - first).max())
    distance = (index - centre[:, None] + 0.5) * (1.0 / stretch)
    weights = keys(distance) if interpolation == "bicubic" else 1.0 - np.abs(distance)
    weights[(index >= last[:, None]) | (np.abs(distance) >= support / stretch)] = 0
    weights /= weights.cumsum(axis=1)[:, -1:]  # from left to right: `sum` adds in another order
    precision, largest = 0, float(weights.max())
    while precision < _FINEST and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    whole = np.trunc(weights * (1 << precision) + np.copysign(0.5, weights)).astype(np.float32)
    return torch.from_numpy(index.clip(0, pixels - 1)), torch.from_numpy(whole), precision


@lru_cache(maxsize=1024)  # sides of crops repeat: there are fewer of them than views in a batch
def taps(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Which pixels of a line make up each pixel of the resized line, and how much each weighs; not to be changed.

    Args:
        length: Pixels of the line.
        size: Pixels of the resized line.

    Returns:
        (size, 4) int64 indices, and (size, 4) float32 weights, each row of which sums to 1.
    """
    centre = (np.arange(size) + 0.5) * (length / size) - 0.5
    index = np.floor(centre).astype(np.int64)[:, None] + np.arange(-1, TAPS - 1)
    weights = keys(centre[:, None] - index)
    weights[(index < 0) | (index >= length)] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    return torch.from_numpy(index.clip(0, length - 1)), torch.from_numpy(weights.astype(np.float32))


def keys(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys's cubic convolution kernel at distances of up to 2 pixels."""
    x, a = np.abs(distance), KEYS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, far)
