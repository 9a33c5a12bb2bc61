"""Google's view arithmetic in float64 NumPy, a pixel, a line or a view at a time: obvious, not fast.

The formulas are those of tf.image (adjust_contrast, adjust_saturation, adjust_hue, rgb_to_grayscale, resize with
BICUBIC) and of google-research/simclr, tf2/data_util.py (the order, the clips, the blur). Nothing is shared with the
package.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def keys(x: float) -> float:
    """The cubic convolution kernel of Keys 1981, a = -1/2 put in."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    if x < 2:
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return 0.0


def resize_matrix(length: int, size: int) -> Floats:
    """(size, length): the kernel at the distance of every pixel from every half-pixel centre, rows scaled to sum 1."""
    matrix = np.zeros((size, length))
    for i in range(size):
        centre = (i + 0.5) * length / size - 0.5
        for j in range(length):
            matrix[i, j] = keys(centre - j)
        matrix[i] /= matrix[i].sum()
    return matrix


def resize(image: npt.NDArray[np.uint8], size: int) -> Floats:
    """(H, W, 3) levels to (size, size, 3) levels, not rounded, overshoot and all."""
    rows, columns = resize_matrix(image.shape[0], size), resize_matrix(image.shape[1], size)
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns)


# Pixels below are (H, W, 3) in [0, 1].


def brightness(pixels: Floats, factor: float) -> Floats:
    return pixels * factor


def contrast(pixels: Floats, factor: float) -> Floats:
    out = np.empty_like(pixels)
    for c in range(3):
        mean = pixels[..., c].mean()
        out[..., c] = (pixels[..., c] - mean) * factor + mean
    return out


def saturation(pixels: Floats, factor: float) -> Floats:
    return _in_hsv(pixels, lambda h, s, v: (h, min(max(s * factor, 0), 1), v))


def hue(pixels: Floats, turn: float) -> Floats:
    return _in_hsv(pixels, lambda h, s, v: ((h + turn) % 1, s, v))


def grayscale(pixels: Floats) -> Floats:
    grey = 0.2989 * pixels[..., 0] + 0.587 * pixels[..., 1] + 0.114 * pixels[..., 2]
    return np.stack([grey] * 3, axis=-1)


def blur(pixels: Floats, sigma: float, size: int) -> Floats:
    """Separable, kernel of size // 10 made odd, black beyond the edges."""
    radius = int((size // 10) / 2)
    kernel = np.array([np.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)])
    kernel /= kernel.sum()
    for axis in (1, 0):
        pixels = np.apply_along_axis(lambda line: np.convolve(np.pad(line, radius), kernel, "valid"), axis, pixels)
    return pixels


def solarize(pixels: Floats, threshold: float) -> Floats:
    return np.where(pixels >= threshold, 1 - pixels, pixels)


def clip(pixels: Floats) -> Floats:
    return np.clip(pixels, 0, 1)


def _in_hsv(pixels: Floats, change: Callable[[float, float, float], Sequence[float]]) -> Floats:
    flat = pixels.reshape(-1, 3).tolist()
    return np.array([colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in flat]).reshape(pixels.shape)
