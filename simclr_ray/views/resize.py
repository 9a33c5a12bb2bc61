"""Bicubic resizing as Google's code does it: Keys's kernel, four pixels each way however much the image shrinks.

`tf.image.resize` with `BICUBIC` and without `antialias`, the kernel of R. G. Keys 1981, "Cubic Convolution
Interpolation for Digital Image Processing", with a = -1/2. Torch's bicubic without antialiasing has a = -3/4 and no
switch for it, so the weights are made here. Pixel centres lie at halves; pixels beyond the edge of the crop weigh
nothing, and the rest of the four is scaled to sum to 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

TAPS: Final = 4
KEYS: Final = -0.5  # the kernel's one free number, a


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
