"""View pairs from encoded images in one call, for programs that have no Ray and no manifest."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from simclr_ray.data.decode import REASONS, Limits
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.views.apply import Image
from simclr_ray.views.policy import Policy, PresetName, preset
from simclr_ray.views.stage import ACCEPTED, ViewStage

_SHOWN = 5
_LARGEST_SIZE = 4096


def two_views(
    encoded: Sequence[bytes],
    *,
    size: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    sample_ids: Sequence[int] | None = None,
    policy: Policy | PresetName = "imagenet",
    limits: Limits | None = None,
    scaled_decode: bool = True,
) -> Image:
    """Decode images and make two SimCLR views of each: what pretraining makes of the same ids, bit for bit.

    A view is a function of (seed, epoch, sample id, view number, policy, image) and of nothing else: not of the batch,
    its order, or the process. Call it with whole batches, from threads or processes as you like: most of its time is
    spent outside Python's lock.

    Args:
        encoded: n encoded images: JPEG, PNG, WebP, GIF, BMP or TIFF.
        size: Side of a view in pixels; None takes the policy's, 224 for `imagenet`.
        seed: Of all draws.
        epoch: Another epoch, other views.
        sample_ids: n numbers that tell images apart; None counts from 0, so that the same place in a batch has the same
            draws, whatever image stands there. Give ids of your own to train.
        policy: A preset's name, or a `simclr_ray.views.policy.Policy`.
        limits: What is decoded at all; None takes `Limits()`.
        scaled_decode: Decode a large JPEG at a fraction of its size where no crop has to be enlarged for it: faster
            from 900 pixels on, and a little different (`views.scaled_decode`).

    Returns:
        (n, 2, S, S, 3) uint8.

    Raises:
        DataError: Images that cannot be decoded, by their place and reason.
        ConfigError: An unknown policy, a size or seed out of range, or another number of ids than images.

    Example:
        >>> views = simclr_ray.two_views([path.read_bytes() for path in paths], seed=1, sample_ids=range(len(paths)))
    """
    if isinstance(policy, str):
        policy = preset(policy, size=size)
    elif size is not None:
        if not 1 <= size <= _LARGEST_SIZE:
            raise ConfigError("views of that size cannot be made", got=size, expected=f"1 to {_LARGEST_SIZE} pixels")
        policy = policy.model_copy(update={"size": size})
    ids = _checked(encoded, seed, epoch, sample_ids)
    if not len(encoded):
        return np.empty((0, 2, policy.size, policy.size, 3), dtype=np.uint8)
    stage = ViewStage(policy, seed, limits or Limits(), scaled_decode=scaled_decode)
    rows = stage.read(encoded, ids, np.full(len(ids), epoch, dtype=np.int64))
    views: Image = stage.make(rows)
    bad = np.flatnonzero(rows.reasons != ACCEPTED)
    if len(bad):
        names = [f"{place} ({REASONS[rows.reasons[place]]})" for place in bad[:_SHOWN].tolist()]
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(f"{len(bad)} of {len(encoded)} images cannot be decoded", got=", ".join(names) + more)
    return views


def _checked(
    encoded: Sequence[bytes], seed: int, epoch: int, sample_ids: Sequence[int] | None
) -> npt.NDArray[np.int64]:
    """The ids, after a look at everything that is not an image's content."""
    if isinstance(encoded, (bytes, bytearray, memoryview)) or not all(type(data) is bytes for data in encoded):
        raise ConfigError("images are given as a list of bytes objects", got=_types(encoded), fix="wrap one as [data]")
    if not 0 <= epoch < 1 << 32:
        raise ConfigError("the epoch is out of range", got=epoch, expected="0 to 2**32 - 1")
    if not 0 <= seed < 1 << 64:
        raise ConfigError("the seed does not fit the generator", got=seed, expected="0 to 2**64 - 1")
    if sample_ids is None:
        return np.arange(len(encoded))
    try:
        ids = [operator.index(one) for one in sample_ids]
    except TypeError:
        raise ConfigError("ids are whole numbers", got=f"sample_ids={list(sample_ids)[:_SHOWN]}") from None
    if len(ids) != len(encoded) or not all(-(1 << 63) <= one < 1 << 63 for one in ids):
        raise ConfigError("each image needs one id of 64 bits", got=f"{len(encoded)} images, {len(ids)} ids")
    return np.array(ids, dtype=np.int64)


def _types(encoded: object) -> str:
    if isinstance(encoded, Sequence) and not isinstance(encoded, (bytes, bytearray, memoryview)):
        return ", ".join(sorted({type(one).__name__ for one in encoded}))
    return type(encoded).__name__
