"""Views of images: the pixels that a draw asks for.

Nothing here is random: the same images, draws and policy give the same bytes, whatever else is in the batch.
Views travel as uint8, channels last; `normalise` makes them floats where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray.data.decode import Decoded
from simclr_ray.views.colour import colour
from simclr_ray.views.draw import Draws
from simclr_ray.views.policy import Policy
from simclr_ray.views.resize import resize_keys, resize_reduced

__all__ = ["Image", "Source", "as_decoded", "central_view", "colour", "crop", "normalise", "two_views"]

Image = npt.NDArray[np.uint8]
Source = Image | Decoded
"""What views are made of: pixels of the full image, or of one that may have been reduced."""


def two_views(images: Sequence[Source], draws: Draws, policy: Policy) -> Image:
    """Make every view that was drawn: crop, flip, colour, blur.

    Args:
        images: n decoded images, (H, W, 3) uint8, of the sizes the draws were made for; or `Decoded`, whose pixels may
            be reduced by 2, 4 or 8 (not in flavour `paper`), while boxes stay in pixels of the full image.
        draws: Of shape (n, views), usually two views.
        policy: The policy they were drawn from.

    Returns:
        (n, views, S, S, 3) uint8.
    """
    views = crop(images, draws, policy)
    flat = torch.from_numpy(views).flatten(0, 1)
    return colour(flat, draws.flatten(), policy).numpy().reshape(views.shape)


def crop(images: Sequence[Source], draws: Draws, policy: Policy) -> Image:
    """Crop, resize and flip as drawn, colours untouched. Arguments as of `two_views`."""
    n, views = draws.shape
    assert len(images) == n, (len(images), n)
    out = np.empty((n, views, policy.size, policy.size, 3), dtype=np.uint8)
    # Python's numbers, all at once: ten times as fast to read one by one as NumPy's.
    boxes = np.stack([draws.top, draws.left, draws.height, draws.width], axis=-1).tolist()
    for image, image_boxes, flips, image_out in zip(images, boxes, draws.flip.tolist(), out, strict=True):
        decoded = as_decoded(image)
        pixels = _tensor(decoded.pixels)
        for view, (box, flip) in enumerate(zip(image_boxes, flips, strict=True)):
            resized = _resize(pixels, box, policy, decoded.reduction)
            image_out[view] = _mirrored(resized) if flip else resized
    return out


def _mirrored(view: Image) -> Image:
    """(S, S, 3), left to right. Torch knows pixels of three bytes; NumPy would copy byte by byte, 8 times as slow."""
    planar = torch.from_numpy(view).permute(2, 0, 1)[None]
    mirrored: Image = planar.flip(3)[0].permute(1, 2, 0).numpy()
    return mirrored


def central_view(images: Sequence[Image], policy: Policy) -> Image:
    """Make the evaluation image: the central square of `policy.central_fraction` of the short side, resized.

    Args:
        images: n decoded images, (H, W, 3) uint8, of any sizes.
        policy: Its `size`, `flavour`, `interpolation` and `central_fraction` count.

    Returns:
        (n, S, S, 3) uint8. A square image of the right size comes back as it is if the fraction is 1.
    """
    out = np.empty((len(images), policy.size, policy.size, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        height, width = image.shape[:2]
        side = max(1, round(min(height, width) * policy.central_fraction))
        # Half a pixel too much goes to the top and left, as in Google's data_util.center_crop.
        box = ((height - side + 1) // 2, (width - side + 1) // 2, side, side)
        out[i] = _resize(_tensor(image), box, policy, reduction=1)
    return out


def normalise(views: Tensor, policy: Policy) -> Tensor:
    """Turn views into what the encoder reads.

    Args:
        views: (m, S, S, 3) uint8, on any device.
        policy: Its `mean` and `std` are applied, if set.

    Returns:
        (m, 3, S, S) float32 on the same device, in [0, 1] or standardised, in channels-last memory: the permutation is
        free.
    """
    assert views.dtype == torch.uint8, views.dtype
    assert views.ndim == 4, views.shape
    pixels = views.to(torch.float32).mul_(1 / 255)
    if policy.mean is not None and policy.std is not None:
        pixels = pixels.sub_(_constant(policy.mean, pixels.device)).div_(_constant(policy.std, pixels.device))
    return pixels.permute(0, 3, 1, 2)


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to a device once: each copy from ordinary memory makes the host wait for a GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def as_decoded(image: Source) -> Decoded:
    """The image with its reduction."""
    return image if isinstance(image, Decoded) else Decoded(image, 1)


def _tensor(image: Image) -> Tensor:
    """The image's memory as a (1, H, W, 3) tensor; a copy of what must not be written (Arrow's), else torch warns."""
    assert image.dtype == np.uint8, image.dtype
    assert image.shape[2:] == (3,), image.shape
    # The batch axis comes before the permutation in `_resize`: added after it, torch would write planar output
    # and copy it back, a quarter of the time.
    return torch.from_numpy(image if image.flags.writeable else image.copy())[None]


def _resize(image: Tensor, box: Sequence[int], policy: Policy, reduction: int) -> Image:
    """Resize a box (top, left, height, width) of a (1, H, W, 3) image to (S, S, 3), as the policy's flavour does."""
    top, left, height, width = box
    assert min(top, left) >= 0, box
    assert top + height <= image.shape[1] * reduction, (box, image.shape, reduction)
    assert left + width <= image.shape[2] * reduction, (box, image.shape, reduction)
    if reduction > 1:
        assert policy.flavour == "torchvision", policy.flavour
        reduced: Image = resize_reduced(image[0], box, policy.size, reduction, policy.interpolation).numpy()
        return reduced
    pixels = image[:, top : top + height, left : left + width]
    if policy.flavour == "paper":
        assert policy.interpolation == "bicubic", policy.interpolation
        keys: Image = resize_keys(pixels[0], policy.size).numpy()
        return keys
    resized = F.interpolate(
        pixels.permute(0, 3, 1, 2),
        size=(policy.size, policy.size),
        mode=policy.interpolation,
        antialias=True,
        align_corners=False,
    )
    view: Image = resized[0].permute(1, 2, 0).numpy()
    return view
