"""Finished views by OpenCV, where the C kernel was not built: what `apply.two_views` makes, some times as fast.

Crops are the twin's own, or its bytes. Colours, blur and solarize are its arithmetic, in float32 on levels from the
first operation to the last, each a pass of OpenCV over pixels that stay in the cache. (On bytes, as OpenCV is mostly
used, they would be as fast and off by 0.4 levels.) OpenCV is optional, any of its distributions will do, and it is
imported when it is first asked for.

Invariants. The bytes depend on nothing but the image, its draw and the policy: not on the batch, nor on threads. They
are within 1 level of the twin's, in all but a few values in a thousand equal; but:

- OpenCV chooses its loops by the processor, so that two machines may differ by as much as either from the twin.
- A value that falls on the other side of a threshold of solarize is inverted, or not.
- The blur leaves out outer taps that weigh at most 0.02 % together, as the kernel does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from simclr_ray.data.decode import Decoded
from simclr_ray.views import apply
from simclr_ray.views.apply import Image, Source, as_decoded
from simclr_ray.views.colour import GREY, WHITE
from simclr_ray.views.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws
from simclr_ray.views.policy import Policy
from simclr_ray.views.resize import filter_taps

__all__ = ["available", "crop", "two_views", "why_not"]

Levels = npt.NDArray[np.float32]

_GREY: Final = np.array([GREY], dtype=np.float32)  # (1, 3)
_DUST: Final = 2e-4
"""Share of a blur's weights, of an axis, that may be left out."""
_ALIGNMENT: Final = 64
"""Of scratch memory, in bytes: sums that start at other places of a register may end in other bits."""


def available() -> bool:
    """Whether OpenCV can be imported here."""
    return not why_not()


def why_not() -> str:
    """What keeps OpenCV from being used, in words; nothing if it can be."""
    return _load()[1]


def two_views(images: Sequence[Source], draws: Draws, policy: Policy) -> Image:
    """Make every view that was drawn: crop, flip, colour, blur.

    Args:
        images: n decoded images, (H, W, 3) uint8, of the sizes the draws were made for; or `Decoded`, reduced ones,
            as in `apply.two_views`.
        draws: Of shape (n, views), usually two views.
        policy: The policy they were drawn from.

    Returns:
        (n, views, S, S, 3) uint8.

    Raises:
        RuntimeError: OpenCV is not here; see `available`.
    """
    cv2 = _needed()
    views = crop(images, draws, policy)
    with _ONE_THREAD.of(cv2):
        workspace = _Workspace(cv2, policy)
        for view, changes in zip(views.reshape(-1, *views.shape[2:]), _changes(draws.flatten(), policy), strict=True):
            workspace.distort(view, changes)
    return views


def crop(images: Sequence[Source], draws: Draws, policy: Policy) -> Image:
    """Crop, resize and flip as drawn, colours untouched: the bytes of `apply.crop`. Arguments as of `two_views`."""
    cv2 = _needed()
    reductions = [as_decoded(image).reduction for image in images]
    reduced = [place for place, reduction in enumerate(reductions) if reduction > 1]
    if not reduced or policy.flavour == "paper":
        return apply.crop(images, draws, policy)
    out = np.empty((*draws.shape, policy.size, policy.size, 3), dtype=np.uint8)
    full = [place for place, reduction in enumerate(reductions) if reduction == 1]
    out[full] = apply.crop([images[place] for place in full], draws[full], policy)
    boxes = np.stack([draws.top, draws.left, draws.height, draws.width], axis=-1).tolist()
    with _ONE_THREAD.of(cv2):
        for place in reduced:
            image = as_decoded(images[place])
            for view, (box, flip) in enumerate(zip(boxes[place], draws.flip[place].tolist(), strict=True)):
                out[place, view] = _resize_reduced(cv2, image, box, policy, flip)
    return out


def _resize_reduced(cv2: Any, image: Decoded, box: Sequence[int], policy: Policy, flip: bool) -> Image:
    """As `resize.resize_reduced`, and flipped: OpenCV turns a crop on its side in a tenth of the time."""
    (top, left, height, width), factor = box, image.reduction
    rows, columns = (slice(a // factor, -(-(a + n) // factor)) for a, n in ((top, height), (left, width)))
    crop = image.pixels[rows, columns]
    assert min(top, left) >= 0, box
    assert crop.shape[:2] == (rows.stop - rows.start, columns.stop - columns.start), (box, image.pixels.shape)
    across = _weigh(cv2.transpose(crop), *filter_taps(left % factor, width, factor, policy.size, policy.interpolation))
    down = _weigh(cv2.transpose(across), *filter_taps(top % factor, height, factor, policy.size, policy.interpolation))
    resized: Image = cv2.flip(down, 1) if flip else down
    return resized


def _weigh(pixels: Image, index: torch.Tensor, weights: torch.Tensor, precision: int) -> Image:
    """Weighted sums of rows (H, W, 3), rounded to levels: (S, W, 3)."""
    table = torch.from_numpy(pixels).flatten(1).float()
    # A power of 2 changes no digit of the sums, which are exact, nor does a half.
    sums = F.embedding_bag(index, table, mode="sum", per_sample_weights=weights * 0.5**precision)
    levels: Levels = sums.add_(0.5).clamp_(0, WHITE).numpy()
    return levels.astype(np.uint8).reshape(len(index), *pixels.shape[1:])


class _Changes(NamedTuple):
    """What happens to the colours of one view."""

    jitter: list[tuple[int, float]]
    """Operations, in their order, and factors."""
    grayscale: bool
    sigma: float
    """0: no blur."""
    solarize: bool


def _changes(draws: Draws, policy: Policy) -> Iterator[_Changes]:
    """One a row of the flattened draws. Operations of no strength are left out."""
    strengths = [policy.brightness, policy.contrast, policy.saturation, policy.hue]
    # Python's numbers, all at once: ten times as fast to read one by one as NumPy's.
    factors = np.stack([draws.brightness, draws.contrast, draws.saturation, draws.hue], axis=-1).tolist()
    sigmas = np.where(draws.blur, draws.sigma, 0.0).tolist()
    columns = (draws.jitter.tolist(), draws.order.tolist(), factors, draws.grayscale.tolist(), sigmas)
    for jitter, order, own, grayscale, sigma, solarize in zip(*columns, draws.solarize.tolist(), strict=True):
        operations = [(number, own[number]) for number in order if strengths[number] > 0] if jitter else []
        yield _Changes(operations, grayscale, sigma, solarize)


class _Workspace:
    """Scratch memory for one view at a time, and the operations on the view that lies there.

    An operation that cannot work in place writes beside and swaps: `pixels` is always the view, (S, S, 3) levels.
    """

    def __init__(self, cv2: ModuleType, policy: Policy) -> None:
        self.cv2: Any = cv2
        self.policy = policy
        self.pixels, self.beside = (_aligned(policy.size, policy.size, 3) for _ in range(2))

    def distort(self, view: Image, changes: _Changes) -> None:
        """Jitter, grayscale, blur and solarize (S, S, 3) pixels in place, in BYOL's order."""
        jitter, grayscale, sigma, solarize = changes
        if not (jitter or grayscale or sigma or solarize):
            return
        np.copyto(self.pixels, view)
        for number, factor in jitter:
            self._jitter(number, factor)
        levels, beside = self.pixels, self.beside
        if grayscale:  # one channel from here on: a third of the work
            levels, beside = self._grey()
        if sigma:
            levels, beside = self._blur(levels, beside, sigma)
        if solarize:
            self._solarize(levels, beside)
        self._store(view, levels)

    def _jitter(self, number: int, factor: float) -> None:
        paper = self.policy.flavour == "paper"
        if number == BRIGHTNESS:
            np.multiply(self.pixels, np.float32(factor), out=self.pixels)
            self._clip(factor)
        elif number == CONTRAST:
            means = self.cv2.mean(self.pixels)[:3]
            middle = np.array(means) if paper else np.dot(GREY, means)
            self._transform(np.eye(3) * factor, (1 - factor) * middle)
            self._clip(factor)
        elif number == HUE:
            self._turn(factor)
        elif paper:
            self._saturate_in_hsv(factor)
        else:
            assert number == SATURATION, number
            self._transform(np.eye(3) * factor + (1 - factor) * np.array(GREY), 0.0)
            self._clip(factor)

    def _transform(self, matrix: npt.NDArray[np.float64], offset: npt.ArrayLike) -> None:
        """Multiply each pixel by the (3, 3) matrix and add the offset, one number or one a channel."""
        affine = np.empty((3, 4), dtype=np.float32)
        affine[:, :3], affine[:, 3] = matrix, np.asarray(offset)
        self.cv2.transform(self.pixels, affine, self.beside)
        self._swap()

    def _clip(self, factor: float) -> None:
        """To levels. A factor of at most 1 pulls towards something inside, and there is nothing to clip."""
        if factor > 1:
            self.cv2.threshold(self.pixels, WHITE, 0, self.cv2.THRESH_TRUNC, dst=self.pixels)
            self.cv2.threshold(self.pixels, 0, 0, self.cv2.THRESH_TOZERO, dst=self.pixels)

    def _turn(self, turn: float) -> None:
        """Turn the HSV circle by a share of it."""
        self.cv2.cvtColor(self.pixels, self.cv2.COLOR_RGB2HSV, self.beside)
        self._swap()
        # By a positive angle: OpenCV wraps what exceeds the circle, and not, in all of its loops, what is below 0.
        self._transform(np.eye(3), (360 * (turn % 1), 0.0, 0.0))
        self.cv2.cvtColor(self.pixels, self.cv2.COLOR_HSV2RGB, self.beside)
        self._swap()

    def _saturate_in_hsv(self, factor: float) -> None:
        """Multiply HSV's saturation."""
        self.cv2.cvtColor(self.pixels, self.cv2.COLOR_RGB2HSV, self.beside)
        self._swap()
        self._transform(np.diag([1.0, factor, 1.0]), 0.0)
        saturation = self.pixels[..., 1]
        np.minimum(saturation, 1, out=saturation)
        self.cv2.cvtColor(self.pixels, self.cv2.COLOR_HSV2RGB, self.beside)
        self._swap()

    def _grey(self) -> tuple[Levels, Levels]:
        """Grey (S, S) of the view, and as much room beside it."""
        size = self.policy.size
        grey, beside = self.beside.reshape(3, size, size)[:2]
        self.cv2.transform(self.pixels, _GREY, grey)
        return grey, beside

    def _blur(self, levels: Levels, beside: Levels, sigma: float) -> tuple[Levels, Levels]:
        """Blur by a Gaussian, to what lies beside; returns the two in their new order."""
        weights = _gaussian(sigma, self.policy.blur_taps // 2)
        if len(weights) == 1:
            return levels, beside
        paper = self.policy.flavour == "paper"  # black comes in from beyond the edge
        border = self.cv2.BORDER_CONSTANT if paper else self.cv2.BORDER_REFLECT_101
        self.cv2.sepFilter2D(levels, -1, weights, weights, beside, borderType=border)
        return beside, levels

    def _solarize(self, levels: Levels, beside: Levels) -> None:
        """Invert the values from the threshold on."""
        bright = np.greater_equal(levels, np.float32(self.policy.solarize_threshold))
        np.subtract(np.float32(WHITE), levels, out=beside)
        self.cv2.copyTo(beside, bright.view(np.uint8), levels)

    def _store(self, view: Image, levels: Levels) -> None:
        """Round to the view's bytes."""
        if levels.ndim == 3:
            self.cv2.convertScaleAbs(levels, view)
        else:
            self.cv2.cvtColor(self.cv2.convertScaleAbs(levels), self.cv2.COLOR_GRAY2RGB, view)

    def _swap(self) -> None:
        self.pixels, self.beside = self.beside, self.pixels


def _gaussian(sigma: float, radius: int) -> Levels:
    """Weights (taps,) of a Gaussian, cut at the radius or where what lies beyond is dust; they sum to 1."""
    offsets = np.arange(radius + 1)
    half = np.exp(-0.5 * (offsets / sigma) ** 2)
    half[1:] *= 2
    kept = np.cumsum(half)
    reach = int(np.searchsorted(kept, (1 - _DUST) * kept[-1]))
    side = half[1 : reach + 1] / 2
    weights: Levels = (np.concatenate([side[::-1], half[:1], side]) / kept[reach]).astype(np.float32)
    return weights


def _aligned(*shape: int) -> Levels:
    """An empty array that starts at a multiple of the alignment."""
    size = int(np.prod(shape))
    raw = np.empty(size + _ALIGNMENT // 4, dtype=np.float32)
    first = -raw.ctypes.data % _ALIGNMENT // 4
    return raw[first : first + size].reshape(shape)


class _OneThread:
    """Keeps OpenCV from spreading a view over several threads, and leaves the program's setting as it was.

    The setting is the process's. The first call of those that run at once notes it, and the last one puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._before = 0

    @contextlib.contextmanager
    def of(self, cv2: Any) -> Iterator[None]:
        with self._lock:
            if not self._calls:
                self._before = cv2.getNumThreads()
                cv2.setNumThreads(1)
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    cv2.setNumThreads(self._before)


_ONE_THREAD: Final = _OneThread()


def _needed() -> ModuleType:
    cv2, reason = _load()
    if cv2 is None:
        raise RuntimeError(reason)
    return cv2


@cache
def _load() -> tuple[ModuleType | None, str]:
    """OpenCV, or none and the reason."""
    try:
        import cv2

        cv2.sepFilter2D  # noqa: B018 - a folder that an uninstalled OpenCV left behind can be imported, too
    except (ImportError, AttributeError, OSError) as error:
        return None, f"OpenCV cannot be imported: {error}; pip install opencv-python-headless"
    return cv2, ""
