"""Colour distortion of views: jitter, grayscale, blur and solarize, batched on whatever device holds the pixels.

Arithmetic is in float32 on levels 0 to 255 from the first operation to the last, clipped after each and rounded
once, so that results are closer to the mathematics than those of uint8 pipelines, which truncate at every step.
The order of the operations is each view's own: fusing them into one matrix would skip the clips between, which at
strength 1 moves the worst view by tens of levels.

Views computed alone, in blocks or all at once differ by one level at most, where the last bits of a float32 decide
how a value is rounded. (A threshold of solarize far from the middle jumps by more there, as it does everywhere.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simclr_ray.precision import full_precision_products
from simclr_ray.views.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Bools, Draws, Floats
from simclr_ray.views.policy import Policy

Rows = npt.NDArray[np.int64]

# Grey of red, green and blue: torchvision's rgb_to_grayscale and TensorFlow's alike (ITU-R 601-2).
GREY: Final = (0.2989, 0.587, 0.114)
WHITE: Final = 255.0

# On a CPU, views are distorted in blocks whose floats stay in the cache; from 148 px on, one by one and in place.
_BLOCK_VALUES: Final = 1 << 19
_ALONE_VALUES: Final = 1 << 16


def colour(views: Tensor, draws: Draws, policy: Policy) -> Tensor:
    """Distort the colours of views, then blur and solarize them, as drawn.

    Args:
        views: (m, S, S, 3) uint8, on any device; not changed.
        draws: Of shape (m,): `Draws.flatten()` of those the views were cropped with.
        policy: Tells the flavour, which operations can be skipped, the size of the blur's kernel, and the threshold.

    Returns:
        (m, S, S, 3) uint8 on the same device.
    """
    assert views.dtype == torch.uint8, views.dtype
    assert views.shape[3:] == (3,), views.shape
    assert draws.shape == views.shape[:1], (draws.shape, views.shape)
    out = torch.empty_like(views)
    block = _views_per_block(views)
    for start in range(0, len(views), block):
        rows = slice(start, start + block)
        pixels = views[rows].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        _distort(pixels, draws[rows], policy)
        # Each step alone is vectorised; one assignment that transposes and converts at once is not.
        levels = pixels.contiguous(memory_format=torch.channels_last).add_(0.5).to(torch.uint8)
        out[rows] = levels.permute(0, 2, 3, 1)
    return out


def _views_per_block(views: Tensor) -> int:
    values = views.shape[1:].numel()
    if views.device.type != "cpu":
        return max(1, len(views))  # launches cost more than memory: all at once
    return 1 if values >= _ALONE_VALUES else _BLOCK_VALUES // values


class _Change(NamedTuple):
    """An operation, and the views of a block that it is the next one for."""

    operate: Callable[..., None]
    rows: Rows
    """(k,), at least one."""
    factors: Floats | None
    """(k,) what the operation is given beside the views, if anything."""


def _distort(pixels: Tensor, draws: Draws, policy: Policy) -> None:
    """Jitter, grayscale, blur and solarize (m, 3, S, S) levels in place, in BYOL's order."""
    changes = _changes(draws, policy)
    for change, (index, factors) in zip(changes, _moved(changes, pixels.device), strict=True):
        parameters = () if change.factors is None else (factors[:, None, None, None],)
        if len(change.rows) == 1:  # a slice, not a copy: on a CPU that is every call for large views
            row = change.rows[0]
            change.operate(pixels[row : row + 1], *parameters)
            continue
        chosen = pixels.index_select(0, index)
        change.operate(chosen, *parameters)
        pixels.index_copy_(0, index, chosen)


def _changes(draws: Draws, policy: Policy) -> list[_Change]:
    """All that happens to the views, in an order that keeps each view's own; what happens to none is left out."""
    gaussian = partial(blur, taps=policy.blur_taps, reflect=policy.flavour == "torchvision")
    steps: list[tuple[Callable[..., None], Bools, Floats | None]] = [
        *_jitter(draws, policy),
        (grayscale, draws.grayscale, None),
        (gaussian, draws.blur & (policy.blur_taps > 1), draws.sigma),
        (partial(solarize, threshold=policy.solarize_threshold), draws.solarize, None),
    ]
    found = [(operate, np.flatnonzero(mask), factors) for operate, mask, factors in steps]
    return [
        _Change(operate, rows, None if factors is None else factors[rows])
        for operate, rows, factors in found
        if len(rows)
    ]


def _jitter(draws: Draws, policy: Policy) -> Iterator[tuple[Callable[..., None], Bools, Floats]]:
    """The four operations, as often as it takes to follow each view's own order; those of no strength are skipped."""
    paper = policy.flavour == "paper"
    operations = (
        (BRIGHTNESS, policy.brightness, draws.brightness, brightness),
        (CONTRAST, policy.contrast, draws.contrast, contrast_of_channels if paper else contrast),
        (SATURATION, policy.saturation, draws.saturation, saturation_in_hsv if paper else saturation),
        (HUE, policy.hue, draws.hue, hue),
    )
    wanted = [(number, factors, operate) for number, strength, factors, operate in operations if strength > 0]
    numbers = np.array([number for number, _, _ in wanted])
    # Each row of the order names each operation once, so that leaving some out leaves rows of one length.
    order = draws.order[np.isin(draws.order, numbers)].reshape(len(draws), len(wanted))
    masks = (order.T[:, None] == numbers[:, None]) & draws.jitter  # (positions, operations, views)
    for position, operation in np.argwhere(masks.any(axis=2)).tolist():
        _, factors, operate = wanted[operation]
        yield operate, masks[position, operation], factors


def _moved(changes: Sequence[_Change], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (k,) int64 and factors (k,) float32 of each change on the device; 0 for the factors of one without.

    They travel as one tensor, to CUDA from pinned memory: each copy of its own would make the host wait for the GPU.
    """
    if not changes:
        return
    lengths = [len(change.rows) for change in changes]
    rows = np.concatenate([change.rows for change in changes])
    factors = np.concatenate([np.zeros(len(c.rows)) if c.factors is None else c.factors for c in changes])
    packed = torch.from_numpy(np.stack([rows, factors.astype(np.float32).view(np.int32)]))  # (2, sum of k) int64
    if device.type == "cuda":
        packed = packed.pin_memory()
    index, bits = packed.to(device, non_blocking=True)
    yield from zip(index.split(lengths), bits.to(torch.int32).view(torch.float32).split(lengths), strict=True)


def brightness(pixels: Tensor, factor: Tensor) -> None:
    """Multiply by the factor, clipped. Pixels (m, 3, H, W) in levels, overwritten; factor (m, 1, 1, 1)."""
    pixels.mul_(factor).clamp_(0, WHITE)


def contrast(pixels: Tensor, factor: Tensor) -> None:
    """Stretch about the view's mean grey, clipped. Shapes as in `brightness`."""
    # The mean of the greys is the grey of the means.
    middle = grey(pixels.mean(dim=(2, 3), keepdim=True))
    pixels.mul_(factor).add_(middle.mul_(1 - factor)).clamp_(0, WHITE)


def contrast_of_channels(pixels: Tensor, factor: Tensor) -> None:
    """Stretch about the view's mean of each channel, clipped: `tf.image.adjust_contrast`. Shapes as in `brightness`."""
    middle = pixels.mean(dim=(2, 3), keepdim=True)
    pixels.mul_(factor).add_(middle.mul_(1 - factor)).clamp_(0, WHITE)


def saturation(pixels: Tensor, factor: Tensor) -> None:
    """Stretch about each pixel's grey, clipped. Shapes as in `brightness`."""
    target = grey(pixels).mul_(1 - factor)
    pixels.mul_(factor).add_(target).clamp_(0, WHITE)


def saturation_in_hsv(pixels: Tensor, factor: Tensor) -> None:
    """Multiply HSV's saturation, clipped: `tf.image.adjust_saturation`. Hue and value are kept. As in `brightness`."""
    # S = (high - low) / high, and the distances to the highest channel are proportional to it: scale them by the
    # factor, but by no more than takes the lowest channel to 0. A pixel without chroma has no distances.
    high, low = pixels.amax(dim=1, keepdim=True), pixels.amin(dim=1, keepdim=True)
    scale = torch.minimum(high / (high - low).clamp_(min=1e-9), factor)
    pixels.sub_(high).mul_(scale).add_(high).clamp_(0, WHITE)


def hue(pixels: Tensor, turn: Tensor) -> None:
    """Turn the HSV circle by a share of it, value and saturation kept. Shapes as in `brightness`."""
    red, green, blue = pixels.unbind(1)  # (m, H, W) each
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    # Position on the circle in sixths, counted from the channel that is highest; 0 where there is no colour. The
    # choices are blends by 0 or 1, which are exact: comparing into bool costs a CPU six times as much.
    sixths = (red - green).add_(chroma, alpha=4)
    sixths.lerp_((blue - red).add_(chroma, alpha=2), torch.eq(high, green, out=torch.empty_like(high)))
    sixths.lerp_(green - blue, torch.eq(high, red, out=torch.empty_like(high)))
    sixths.div_(chroma.clamp(min=1e-9)).add_(turn[:, 0] * 6)
    sixths.sub_((sixths / 6).floor_().mul_(6))
    torch.sub(sixths, 3, out=red).abs_().sub_(1)
    torch.sub(sixths, 2, out=green).abs_().neg_().add_(2)
    torch.sub(sixths, 4, out=blue).abs_().neg_().add_(2)
    pixels.clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


def grayscale(pixels: Tensor) -> None:
    """Give all three channels the grey of the pixel. Shapes as in `brightness`."""
    pixels.copy_(grey(pixels).expand_as(pixels))


def grey(pixels: Tensor) -> Tensor:
    """Grey of (m, 3, H, W) as (m, 1, H, W)."""
    red, green, blue = pixels.unbind(1)
    return torch.mul(red, GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])[:, None]


def solarize(pixels: Tensor, *, threshold: float) -> None:
    """Invert the values from the threshold on, as torchvision's `solarize`. Shapes as in `brightness`."""
    bright = torch.ge(pixels, threshold, out=torch.empty_like(pixels))  # 0 or 1: a blend is exact, as in `hue`
    pixels.lerp_(WHITE - pixels, bright)


def blur(pixels: Tensor, sigma: Tensor, *, taps: int, reflect: bool = True) -> None:
    """Blur each view with its own Gaussian.

    Args:
        pixels: (m, 3, S, S) float, overwritten.
        sigma: (m, 1, 1, 1) standard deviations in pixels.
        taps: Odd size of the kernel; what lies beyond is cut and the rest sums to 1.
        reflect: What lies beyond the edges: the view's mirror image, as in torchvision's `gaussian_blur`, or black, as
            in Google's (TensorFlow's `SAME`), which darkens the rim.
    """
    m, channels, size, _ = pixels.shape
    # A blur along an axis is a banded matrix, reflection folded in. The products are mostly with zeros and yet
    # faster than a grouped convolution: 0.7 against 1.3 ms a view of 224 px on one core.
    matrix = _blur_matrix(sigma.view(m, 1), size, taps, reflect=reflect)  # (m, S, S)
    with torch.autocast(pixels.device.type, enabled=False), full_precision_products():
        wide = torch.bmm(pixels.reshape(m, channels * size, size), matrix.mT).view(m, channels, size, size)
        torch.matmul(matrix[:, None], wide, out=pixels)


def _blur_matrix(sigma: Tensor, size: int, taps: int, *, reflect: bool = True) -> Tensor:
    """(m, size, size) of (m, 1) sigmas: row i holds the weights of the pixels that make up blurred pixel i."""
    radius = taps // 2
    assert radius < size, (taps, size)
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    # Weights below e**-40 would be denormal numbers, on which a CPU multiplies 50 times slower; they are dust.
    exponent = 0.5 * (offsets / sigma) ** 2
    kernel = torch.exp(-exponent).masked_fill_(exponent >= 40, 0.0)
    kernel /= kernel.sum(dim=1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + offsets  # (size, taps)
    weights = kernel[:, None].expand(len(sigma), size, taps)
    if reflect:
        source = (size - 1) - (size - 1 - source.abs()).abs()
    else:
        weights = weights * ((source >= 0) & (source < size))
        source = source.clamp(0, size - 1)
    matrix = torch.zeros(len(sigma), size, size, dtype=sigma.dtype, device=sigma.device)
    return matrix.scatter_add_(2, source.expand_as(weights), weights)
