"""What happens to this sample: a policy's distributions turned into numbers, a whole batch at once.

Invariant: a draw is a function of its address (seed, epoch, sample id, view), of the policy and of the image's
size, and of nothing else. Batches, their order, ranks, processes and retries cannot change it.

The address is the input of a counter-based generator (`philox.py`): the seed is the key; the counter holds the
sample id (two words), the epoch, and the view with the number of the block of four words. Which word feeds which
parameter is fixed by `_WORDS`; changing that table changes every run that was ever started.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from simclr_ray.errors import ConfigError
from simclr_ray.philox import key_of, philox4x32, uniforms
from simclr_ray.views.policy import Policy

Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

ATTEMPTS: Final = 10  # torchvision's RandomResizedCrop.get_params
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
_NUM_WORDS: Final = _FIRST_ATTEMPT + 2 * ATTEMPTS
_BLOCKS: Final = _NUM_WORDS // 4
assert _NUM_WORDS % 4 == 0


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
    """Blur at the end."""
    sigma: Floats
    """Standard deviation of the blur, in pixels of the view."""

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
) -> Draws:
    """Draw the parameters of `views` views of each of n samples.

    Args:
        policy: The distributions.
        seed: The run's seed, 0 to 2**64 - 1.
        epoch: Pass over the data, one for all samples or (n,); 0 to 2**32 - 1.
        sample_ids: (n,) stable 64-bit ids from the manifest.
        sizes: (n, 2) heights and widths of the decoded images, in pixels.
        views: Views of each sample; draws of view v do not depend on how many there are.

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
    u = _uniforms(seed, np.asarray(epoch), sample_ids, views)  # (n, views, _NUM_WORDS)

    def word(name: str) -> Floats:
        return u[..., _WORDS[name]]

    top, left, height, width = _crop_boxes(policy, sizes, u)
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
    )


def _uniforms(seed: int, epoch: npt.NDArray[Any], sample_ids: npt.NDArray[np.int64], views: int) -> Floats:
    """The numbers in [0, 1) at each address: (n, views, _NUM_WORDS)."""
    n = len(sample_ids)
    assert epoch.shape in ((), (n,)), epoch.shape
    assert ((epoch >= 0) & (epoch < 1 << 32)).all(), epoch
    assert views < 1 << 16, views
    ids = np.asarray(sample_ids, dtype=np.int64).view(np.uint64)
    counter = np.empty((n, views, _BLOCKS, 4), dtype=np.uint32)
    counter[..., 0] = (ids & np.uint64(0xFFFFFFFF))[:, None, None]
    counter[..., 1] = (ids >> np.uint64(32))[:, None, None]
    counter[..., 2] = np.broadcast_to(epoch, (n,))[:, None, None]
    counter[..., 3] = (np.arange(views) << 16)[:, None] + np.arange(_BLOCKS)
    return uniforms(philox4x32(counter, key_of(seed))).reshape(n, views, _NUM_WORDS)


def _crop_boxes(policy: Policy, sizes: npt.NDArray[Any], u: Floats) -> tuple[Ints, Ints, Ints, Ints]:
    """Boxes (top, left, height, width), each (n, views), as torchvision's `RandomResizedCrop.get_params`.

    The first of ten attempts that fits inside the image wins: area uniform in the policy's share, aspect ratio
    log-uniform, sides rounded half to even. If none fits, the largest central box of an allowed ratio.
    """
    high, wide = (sizes[:, i].astype(np.float64)[:, None] for i in range(2))  # (n, 1)
    tries = u[..., _FIRST_ATTEMPT:]  # (n, views, 2 * ATTEMPTS)
    area = (high * wide)[..., None] * _between(*policy.crop_scale, tries[..., 0::2])
    lo, hi = np.log(policy.crop_ratio)
    ratio = np.exp(_between(lo, hi, tries[..., 1::2]))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= wide[..., None]) & (heights > 0) & (heights <= high[..., None])
    first = fits.argmax(axis=-1)[..., None]
    found = fits.any(axis=-1)
    central_height, central_width = _central_box(policy, high, wide)
    height = np.where(found, np.take_along_axis(heights, first, axis=-1)[..., 0], central_height)
    width = np.where(found, np.take_along_axis(widths, first, axis=-1)[..., 0], central_width)
    top = np.where(found, u[..., _WORDS["top"]] * (high - height + 1), (high - height) // 2)
    left = np.where(found, u[..., _WORDS["left"]] * (wide - width + 1), (wide - width) // 2)
    return top.astype(np.int32), left.astype(np.int32), height.astype(np.int32), width.astype(np.int32)


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
