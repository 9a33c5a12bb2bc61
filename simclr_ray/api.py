"""The verbs as functions: what the command line calls, for use from Python."""

from __future__ import annotations

from simclr_ray.config import ClusterConfig
from simclr_ray.data.decode import Limits
from simclr_ray.data.fetch import fetch_data
from simclr_ray.data.pack import Labels, PackReport
from simclr_ray.data.pack import pack as _pack
from simclr_ray.evaluate.encode import load_encoder
from simclr_ray.evaluate.evaluate import evaluate
from simclr_ray.evaluate.preview import preview
from simclr_ray.train.cluster import connected
from simclr_ray.train.pretrain import RunResult, pretrain

__all__ = ["RunResult", "evaluate", "fetch_data", "load_encoder", "pack", "pretrain", "preview"]


def pack(
    source: str,
    destination: str,
    *,
    labels: Labels = "none",
    seed: int = 0,
    shard_bytes: int = 256 << 20,
    limits: Limits | None = None,
    address: str | None = None,
) -> PackReport:
    """Pack loose images into shards and a manifest; see `simclr_ray.data.pack.pack`. Starts Ray where none runs.

    Args:
        source: Folder or list of images.
        destination: Empty or absent folder.
        labels: Where labels come from.
        seed: Of the shuffle.
        shard_bytes: Wanted size of a shard.
        limits: What an image may be.
        address: Of a running Ray cluster; None uses RAY_ADDRESS or starts a local one.

    Raises:
        DataError: nothing to read, or no image among it.
        ConfigError: the destination is not empty.
    """
    return _pack(
        source,
        destination,
        labels=labels,
        seed=seed,
        shard_bytes=shard_bytes,
        limits=limits,
        ray_ready=lambda: connected(ClusterConfig(address=address)),
    )
