"""Finished views by a small C kernel, `native.c`: what `apply.two_views` and `apply.crop` make, many times as fast.

The kernel is optional: built when the package is installed and a C compiler is there, loaded by ctypes, which lets
other Python threads run during a call. `available` tells whether it is there.

Invariants. The bytes depend on nothing but the image, its draw and the policy: not on the batch, on threads or on the
machine, and not on the instruction set, for no sum changes its order with the width of a register. They are those of
the twin, up to float32 results on the two sides of a half:

- Crops are the bytes of `apply.crop`; in flavour `paper`, which resizes in floats, a few in a million are 1 level off.
- Finished views are within 1 level, fewer than one value in a thousand at all. In flavour `paper` the jitter may
  stretch a crop's 1 level to a few, for those few. At a threshold of solarize far from the middle, a value that falls
  on the other side of it is inverted, or not.
- The blur leaves out outer taps that weigh at most 0.02 % together: 0.1 level at most before rounding.

This is a boundary to code that trusts addresses: unlike its twin it refuses what does not fit with a `ValueError`, also
under `python -O`.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from simclr_ray.views.apply import Image, Source, as_decoded
from simclr_ray.views.draw import Draws
from simclr_ray.views.policy import Policy

__all__ = ["available", "crop", "two_views", "why_not"]

# Numbers and layouts shared with native.c.
_SOURCE: Final = Path(__file__).with_name("native.c")
_VERSION: Final = 2
_DONE, _OTHER_VERSION, _NO_MEMORY, _BAD_SIZE, _BAD_BOX, _BAD_REDUCTION = range(6)
_NOTHING: Final = 4  # in `operations`, beside the numbers of draw.py
PLAIN, AVX2, AVX512 = range(3)  # instruction sets
_VIEW: Final = np.dtype(
    [(name, np.int32) for name in ("top", "left", "height", "width")]
    + [(name, np.float32) for name in ("brightness", "contrast", "saturation", "hue", "sigma")]
    + [
        ("operations", np.uint8, 4),
        ("flip", np.uint8),
        ("grayscale", np.uint8),
        ("solarize", np.uint8),
        ("unused", np.uint8),
    ]
)
_LARGEST: Final = 1e6
"""Of a colour's factor: far beyond any policy, and far from where float32 overflows."""


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("version", "level", "size", "paper", "bicubic", "taps")),
        ("threshold", ctypes.c_float),
        ("unused", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("images", "views")),
        *((name, ctypes.c_void_p) for name in ("pixels", "sizes", "draws", "out")),
        ("bad", ctypes.c_int64),
    ]


def available() -> bool:
    """Whether the kernel was built with this version of the package and runs here."""
    return not why_not()


def why_not() -> str:
    """What keeps the kernel from being used, in words; nothing if it can be."""
    return _load()[1]


def two_views(images: Sequence[Source], draws: Draws, policy: Policy, *, out: Image | None = None) -> Image:
    """Make every view that was drawn: crop, flip, colour, blur.

    Args:
        images: n decoded images, (H, W, 3) uint8, of the sizes the draws were made for; or `Decoded`, whose pixels may
            be reduced by 2, 4 or 8 (not in flavour `paper`), while boxes stay in pixels of the full image.
        draws: Of shape (n, views), usually two views.
        policy: The policy they were drawn from.
        out: Where to write, C-contiguous, of the result's shape; by default a new array.

    Returns:
        (n, views, S, S, 3) uint8.

    Raises:
        ValueError: An array of another shape or type, a crop that leaves its image, a reduction that is none, or a
            draw that no policy makes.
        MemoryError: No room for scratch memory: 12 bytes a pixel of one view, and some rows of the largest crop.
    """
    return _make(images, draws, policy, colours=True, out=out)


def crop(images: Sequence[Source], draws: Draws, policy: Policy, *, out: Image | None = None) -> Image:
    """Crop, resize (antialiased) and flip as drawn, colours untouched. Arguments and errors as of `two_views`."""
    return _make(images, draws, policy, colours=False, out=out)


def _make(
    images: Sequence[Source],
    draws: Draws,
    policy: Policy,
    *,
    colours: bool,
    out: Image | None = None,
    level: int = AVX512,
) -> Image:
    """Let the kernel make the views. `level` is the best instruction set that it may use."""
    kernel, reason = _load()
    if kernel is None:
        raise RuntimeError(reason)
    if len(draws.shape) != 2 or len(images) != len(draws):
        raise ValueError(f"{len(images)} images and draws of shape {draws.shape}, not (images, views)")
    n, views = draws.shape
    shape = (n, views, policy.size, policy.size, 3)
    if out is None:
        out = np.empty(shape, dtype=np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(f"out: {out.dtype} {out.shape}, not C-contiguous writable uint8 {shape}")
    decoded = [as_decoded(image) for image in images]
    pixels = [_pixels(image.pixels) for image in decoded]  # holds copies until the call is over
    addresses = np.array([image.__array_interface__["data"][0] for image in pixels], dtype=np.uintp)
    sizes = np.array([(*image.pixels.shape[:2], image.reduction) for image in decoded], dtype=np.int32)
    rows = _rows(draws, policy, colours)
    job = _Job(
        version=_VERSION,
        level=level,
        size=policy.size,
        paper=policy.flavour == "paper",
        threshold=policy.solarize_threshold,
        bicubic=policy.interpolation == "bicubic",
        taps=policy.blur_taps,
        images=n,
        views=views,
        pixels=addresses.ctypes.data,
        sizes=sizes.ctypes.data,
        draws=rows.ctypes.data,
        out=out.ctypes.data,
    )
    code = kernel(ctypes.byref(job))
    if code == _NO_MEMORY:
        raise MemoryError("no scratch memory for the views")
    if code == _BAD_BOX:
        image, view = divmod(job.bad, views)
        box = [int(rows[image, view][name]) for name in ("top", "left", "height", "width")]
        size, reduction = pixels[image].shape[:2], decoded[image].reduction
        by = f" reduced by {reduction}" if reduction > 1 else ""
        raise ValueError(f"the crop {box} (top, left, height, width) is not inside image {image} of {size} pixels{by}")
    if code == _BAD_REDUCTION:
        allowed = "1 in flavour paper" if policy.flavour == "paper" else "1, 2, 4 or 8"
        raise ValueError(f"image {job.bad} is reduced by {decoded[job.bad].reduction}, not by {allowed}")
    if code != _DONE:
        where = f"image {job.bad} of {pixels[job.bad].shape[:2]} pixels" if job.bad >= 0 else f"{policy.blur_taps} taps"
        raise ValueError(f"a size out of range: views of {policy.size} pixels, {where}")
    return out


def _pixels(image: Image) -> Image:
    """The image itself, or a copy whose rows follow each other in memory."""
    if image.dtype != np.uint8 or image.shape[2:] != (3,):
        raise ValueError(f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}")
    return np.ascontiguousarray(image)


def _rows(draws: Draws, policy: Policy, colours: bool) -> npt.NDArray[Any]:
    """The draws as the kernel reads them, (n, views) of `_VIEW`."""
    rows = np.zeros(draws.shape, dtype=_VIEW)
    for name in ("top", "left", "height", "width", "flip"):
        rows[name] = getattr(draws, name)
    rows["operations"] = _NOTHING
    if not colours:
        return rows
    for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
        if not (np.abs(getattr(draws, name)) <= _LARGEST).all():  # nor NaN
            raise ValueError(f"{name}: a draw is not finite, or beyond {_LARGEST:g}")
    if (np.bitwise_or.reduce(np.left_shift(1, draws.order), axis=-1) != 0b1111).any():
        raise ValueError("order: a row is no permutation of the four operations")
    if (draws.blur & ~(draws.sigma > 0)).any():
        raise ValueError("sigma: not above 0 where there is a blur")
    for name in ("brightness", "contrast", "saturation", "grayscale", "solarize"):
        rows[name] = getattr(draws, name)
    # In sixths of the circle, from 1 to 7: so much that no position on it becomes negative.
    rows["hue"] = np.mod(6 * draws.hue - 1, 6) + 1
    strengths = np.array([policy.brightness, policy.contrast, policy.saturation, policy.hue])
    drawn = draws.jitter[..., None] & (strengths > 0)[draws.order]
    rows["operations"] = np.where(drawn, draws.order, _NOTHING)
    rows["sigma"] = np.where(draws.blur, draws.sigma, 0)
    return rows


@cache
def _load() -> tuple[Callable[..., int] | None, str]:
    """The kernel, or none and the reason."""
    file = _file()
    if file is None:
        return None, "the kernel was not built: install a C compiler, then the package again"
    try:
        library = ctypes.CDLL(str(file))
        kernel, digest = library.simclr_ray_make_views, library.simclr_ray_digest
    except (OSError, AttributeError) as error:
        return None, f"the kernel cannot be loaded: {error}"
    kernel.argtypes, kernel.restype = [ctypes.POINTER(_Job)], ctypes.c_int
    digest.restype = ctypes.c_uint64
    built_from, here = digest(), int(hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16], 16)
    if built_from not in (0, here) or kernel(ctypes.byref(_Job(version=_VERSION, size=1, taps=1))) != _DONE:
        return None, "the kernel was built from another version of the package: install it again"
    return kernel, ""


def _file() -> Path | None:
    """The shared library that setup.py put beside this file."""
    files = [Path(__file__).with_name("_native" + suffix) for suffix in EXTENSION_SUFFIXES]
    return next((file for file in files if file.exists()), None)
