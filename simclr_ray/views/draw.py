"""What happens to this sample: a policy's distributions turned into numbers, a whole batch at once.

Invariant: a draw is a function of its address (seed, epoch, sample id, view), of the policy and of the image's
size, and of nothing else. Batches, their order, ranks, processes and retries cannot change it.

The address is the input of a counter-based generator (`philox.py`): the seed is the key; the counter holds the
sample id (two words), the epoch, and the view with the number of the block of four words. Which word feeds which
parameter is fixed for good; changing it would change every run that was ever started:

    blocks 0 to 2     `_WORDS`, one word a parameter
    blocks 3 to 7     area and ratio of the crop's attempts 0 and 1, 2 and 3, ..., 8 and 9
    block 8           solarize, then three words that feed nothing yet
    blocks 9 to 15    nothing yet: for parameters to come
    blocks 16 to 60   attempts 10 and 11, ..., 98 and 99, of flavour `paper` alone

Blocks after the seventh are computed only where they count: block 8 if the policy solarizes, the last row only for
views that have no crop after ten attempts. What is not computed is not skipped either: each block stands at its own
address.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from simclr_ray.errors import ConfigError
from simclr_ray.philox import UInt32Array, key_of, philox4x32, uniforms
from simclr_ray.views.policy import Policy

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

ATTEMPTS: Final = 10  # torchvision's RandomResizedCrop.get_params
PAPER_ATTEMPTS: Final = 100  # Google's data_util.distorted_bounding_box_crop(max_attempts=100)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers in `Draws.order`, as in torchvision's ColorJitter
_ORDERS: Final = np.array(list(itertools.permutations(range(4))), dtype=np.int8)  # (24, 4)

_WORDS: Final = {
    "flip": 0,
    "jitter": 1,
    "order": 2,
    "grayscale": 3,
    "brightness": 4,
    "contrast": 5,
    "saturation": 6,
    "hue": 7,
    "blur": 8,
    "sigma": 9,
    "top": 10,
    "left": 11,
}
_FIRST_ATTEMPT: Final = len(_WORDS)  # then area and ratio of attempt 0, of attempt 1, ...
_SOLARIZE: Final = _FIRST_ATTEMPT + 2 * ATTEMPTS
_BLOCKS: Final = _SOLARIZE // 4  # as many as every policy needs
_MORE_ATTEMPTS: Final = 16  # block of attempt ATTEMPTS
assert _SOLARIZE % 4 == 0


@dataclass(frozen=True)
class Draws:
    """Parameters of views, one array a parameter, all of one shape: (n, views), or (m,) once flattened.

    `order` has a last axis of 4: the operations in the order in which they are applied.
    """

    top: Ints
    """First row of the crop, in pixels of the image."""
    left: Ints
    """First column of the crop."""
    height: Ints
    """Rows of the crop."""
    width: Ints
    """Columns of the crop."""
    flip: Bools
    """Mirror left to right, after the crop."""
    jitter: Bools
    """Apply the four colour operations."""
    brightness: Floats
    """Factor of the brightness."""
    contrast: Floats
    """Factor of the contrast."""
    saturation: Floats
    """Factor of the saturation."""
    hue: Floats
    """Turn of the hue, as a share of the circle."""
    order: npt.NDArray[np.int8]
    """Permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE."""
    grayscale: Bools
    """Drop the colour."""
    blur: Bools
    """Blur after the colours."""
    sigma: Floats
    """Standard deviation of the blur, in pixels of the view."""
    solarize: Bools
    """Invert the bright values, last of all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of every array but `order`, which has one axis more."""
        return self.top.shape

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, rows: Any) -> Draws:
        """The draws of some rows; anything that indexes the leading axes of an array will do."""
        return Draws(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def flatten(self) -> Draws:
        """One row a view: (n, views) becomes (n * views,), the views of an image side by side."""
        assert self.top.ndim == 2, self.shape
        return Draws(**{f.name: _merge(getattr(self, f.name)) for f in fields(self)})


def draw(
    policy: Policy,
    *,
    seed: int,
    epoch: int | npt.NDArray[np.integer[Any]],
    sample_ids: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.integer[Any]],
    views: int = 2,
    first_view: int = 0,
) -> Draws:
    """Draw the parameters of `views` views of each of n samples.

    Args:
        policy: The distributions.
        seed: The run's seed, 0 to 2**64 - 1.
        epoch: Pass over the data, one for all samples or (n,); 0 to 2**32 - 1.
        sample_ids: (n,) stable 64-bit ids from the manifest.
        sizes: (n, 2) heights and widths of the decoded images, in pixels.
        views: Views of each sample; draws of view v do not depend on how many there are.
        first_view: The views are this one and those after it.

    Returns:
        Draws of shape (n, views).

    Raises:
        ConfigError: The seed does not fit 64 bits.
    """
    if not 0 <= seed < 1 << 64:
        raise ConfigError("the seed does not fit the generator", got=seed, expected="0 to 2**64 - 1")
    n = len(sample_ids)
    assert sizes.shape == (n, 2), sizes.shape
    assert (sizes >= 1).all(), sizes.min()
    assert 0 <= first_view <= first_view + views <= 1 << 16, (first_view, views)
    samples = _Samples.at(seed, np.asarray(epoch), sample_ids, first_view)
    solarizes = policy.solarize_probability > 0
    u = samples.uniforms(np.arange(n)[:, None], np.arange(views), 0, _BLOCKS + solarizes)  # (n, views, words)

    def word(name: str) -> Floats:
        return u[..., _WORDS[name]]

    top, left, height, width = _crop_boxes(policy, sizes, u, samples)
    return Draws(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=word("flip") < policy.flip_probability,
        jitter=word("jitter") < policy.jitter_probability,
        brightness=_between(*_factors(policy.brightness), word("brightness")),
        contrast=_between(*_factors(policy.contrast), word("contrast")),
        saturation=_between(*_factors(policy.saturation), word("saturation")),
        hue=_between(-policy.hue, policy.hue, word("hue")),
        order=_ORDERS[(word("order") * len(_ORDERS)).astype(np.int64)],
        grayscale=word("grayscale") < policy.grayscale_probability,
        blur=word("blur") < policy.blur_probability,
        sigma=_between(*policy.blur_sigma, word("sigma")),
        solarize=u[..., _SOLARIZE] < policy.solarize_probability if solarizes else np.zeros((n, views), np.bool_),
    )


@dataclass(frozen=True)
class _Samples:
    """What the addresses of n samples have in common."""

    key: UInt32Array
    ids: npt.NDArray[np.uint64]
    epochs: npt.NDArray[np.int64]
    first_view: int

    @classmethod
    def at(cls, seed: int, epoch: npt.NDArray[Any], sample_ids: npt.NDArray[np.int64], first_view: int) -> _Samples:
        n = len(sample_ids)
        assert epoch.shape in ((), (n,)), epoch.shape
        assert ((epoch >= 0) & (epoch < 1 << 32)).all(), epoch
        ids = np.asarray(sample_ids, dtype=np.int64).view(np.uint64)
        return cls(key_of(seed), ids, np.broadcast_to(epoch, (n,)).astype(np.int64), first_view)

    def uniforms(self, rows: npt.NDArray[Any], views: npt.NDArray[Any], first: int, blocks: int) -> Floats:
        """Numbers in [0, 1) of `blocks` blocks from block `first` on.

        Args:
            rows: Which of the samples.
            views: Which view of each, counted from `first_view`; broadcasts against the rows, to some shape.
            first: Block.
            blocks: How many.

        Returns:
            (*shape, 4 * blocks).
        """
        shape = np.broadcast_shapes(rows.shape, views.shape)
        ids = self.ids[rows]
        counter = np.empty((*shape, blocks, 4), dtype=np.uint32)
        counter[..., 0] = (ids & np.uint64(0xFFFFFFFF))[..., None]
        counter[..., 1] = (ids >> np.uint64(32))[..., None]
        counter[..., 2] = self.epochs[rows][..., None]
        counter[..., 3] = ((self.first_view + views) << 16)[..., None] + np.arange(first, first + blocks)
        return uniforms(philox4x32(counter, self.key)).reshape(*shape, 4 * blocks)


def _crop_boxes(policy: Policy, sizes: npt.NDArray[Any], u: Floats, samples: _Samples) -> tuple[Ints, Ints, Ints, Ints]:
    """Boxes (top, left, height, width), each (n, views): the first attempt that fits inside the image wins.

    Flavour `torchvision`, as its `RandomResizedCrop.get_params`: ten attempts, then the largest central box of an
    allowed ratio. Flavour `paper`: a hundred attempts, then the whole image.
    """
    high, wide = (sizes[:, i].astype(np.float64)[:, None] for i in range(2))  # (n, 1)
    height, width, found = _first_fit(policy, high, wide, u[..., _FIRST_ATTEMPT:_SOLARIZE])
    if policy.flavour == "paper":
        _try_again(policy, sizes, (height, width, found), samples)
        height, width = np.where(found, height, high), np.where(found, width, wide)
    else:
        central_height, central_width = _central_box(policy, high, wide)
        height, width = np.where(found, height, central_height), np.where(found, width, central_width)
    top = np.where(found, u[..., _WORDS["top"]] * (high - height + 1), (high - height) // 2)
    left = np.where(found, u[..., _WORDS["left"]] * (wide - width + 1), (wide - width) // 2)
    return top.astype(np.int32), left.astype(np.int32), height.astype(np.int32), width.astype(np.int32)


def _first_fit(policy: Policy, high: Floats, wide: Floats, tries: Floats) -> tuple[Floats, Floats, Bools]:
    """Height and width of the first attempt that fits, and whether there is one.

    The area is uniform in the policy's share; the aspect ratio is log-uniform in flavour `torchvision`, uniform in
    `paper`; sides are rounded half to even.

    Args:
        policy: The distributions.
        high: Height of the image; broadcasts against the tries but for their last axis.
        wide: Width of the image.
        tries: (..., 2 * attempts): numbers for area and ratio in turn.
    """
    area = (high * wide)[..., None] * _between(*policy.crop_scale, tries[..., 0::2])
    if policy.flavour == "paper":
        ratio = _between(*policy.crop_ratio, tries[..., 1::2])
    else:
        lo, hi = np.log(policy.crop_ratio)
        ratio = np.exp(_between(lo, hi, tries[..., 1::2]))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= wide[..., None]) & (heights > 0) & (heights <= high[..., None])
    first = fits.argmax(axis=-1)[..., None]
    height, width = (np.take_along_axis(sides, first, axis=-1)[..., 0] for sides in (heights, widths))
    return height, width, np.any(fits, axis=-1)


def _try_again(policy: Policy, sizes: npt.NDArray[Any], boxes: tuple[Floats, Floats, Bools], samples: _Samples) -> None:
    """Attempts 10 to 99, ten at a time, for those views alone that still have no box; fills in `boxes`.

    Photographs hardly ever come here: at 4:3, one view in a million. Strips do.
    """
    height, width, found = boxes
    per_round = ATTEMPTS // 2  # blocks: each holds two attempts
    for block in range(_MORE_ATTEMPTS, _MORE_ATTEMPTS + (PAPER_ATTEMPTS - ATTEMPTS) // 2, per_round):
        rows, views = np.nonzero(~found)
        if not len(rows):
            return
        high, wide = (sizes[rows, i].astype(np.float64) for i in range(2))
        tries = samples.uniforms(rows, views, block, per_round)
        height[rows, views], width[rows, views], found[rows, views] = _first_fit(policy, high, wide, tries)


def _central_box(policy: Policy, high: Floats, wide: Floats) -> tuple[Floats, Floats]:
    """Height and width of the largest box of an allowed ratio: the whole image, or the whole of its short side."""
    narrowest, widest = policy.crop_ratio
    height = np.where(wide / high < narrowest, np.rint(wide / narrowest), high)
    width = np.where(wide / high > widest, np.rint(high * widest), wide)
    return np.clip(height, 1, high), np.clip(width, 1, wide)


def _factors(strength: float) -> tuple[float, float]:
    """Range of a factor of the given strength around 1; a factor is never negative."""
    return max(0.0, 1.0 - strength), 1.0 + strength


def _between(low: float, high: float, u: Floats) -> Floats:
    return low + (high - low) * u


def _merge(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.reshape(-1, *array.shape[2:])
