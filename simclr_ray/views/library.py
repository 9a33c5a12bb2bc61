"""View pairs from encoded images in one call, for programs that have no Ray and no manifest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simclr_ray.data.decode import REASONS, Limits
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.views.apply import Image
from simclr_ray.views.policy import Policy, PresetName, preset
from simclr_ray.views.stage import ACCEPTED, ViewStage

_SHOWN = 5


def two_views(
    encoded: Sequence[bytes],
    *,
    size: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    sample_ids: Sequence[int] | None = None,
    policy: Policy | PresetName = "imagenet",
    limits: Limits | None = None,
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
        policy = Policy.model_validate(policy.model_dump() | {"size": size})
    ids = np.arange(len(encoded)) if sample_ids is None else np.asarray(sample_ids, dtype=np.int64)
    if ids.shape != (len(encoded),):
        raise ConfigError("each image needs one id", got=f"{len(encoded)} images, ids of shape {ids.shape}")
    if not len(encoded):
        return np.empty((0, 2, policy.size, policy.size, 3), dtype=np.uint8)
    column = np.empty(len(encoded), dtype=object)
    column[:] = list(encoded)
    unit = {"image": column, "sample_id": ids, "epoch": np.full(len(ids), epoch), "unit": np.zeros(len(ids), np.int64)}
    out = ViewStage(policy, seed, limits or Limits()).columns(unit)
    bad = np.flatnonzero(out["reason"] != ACCEPTED)
    if len(bad):
        names = [f"{place} ({REASONS[out['reason'][place]]})" for place in bad[:_SHOWN].tolist()]
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(f"{len(bad)} of {len(encoded)} images cannot be decoded", got=", ".join(names) + more)
    views: Image = out["views"]  # type: ignore[assignment]
    return views
