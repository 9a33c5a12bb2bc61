"""What benchmarks/ingest.py streams: the crops that benchmarks/views.py times, packed as the stream reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from views_photos import CASES, Photos, encoded_crops

from simclr_ray.data.manifest import UNIT_ROWS, Manifest, write_manifest
from simclr_ray.data.shards import ImageRow, write_shard

CASE = CASES[0]
"""500 x 375 pixels, ImageNet's usual size, to views of 224."""
_UNITS_A_SHARD = 4


def write_crops(crops: Sequence[bytes], folder: str) -> Manifest:
    """Shards and a manifest as `simclr-ray pack` writes them, on a disk or in a store."""
    rows = [ImageRow(data, None, f"crop-{number}.jpg") for number, data in enumerate(crops)]
    step = _UNITS_A_SHARD * UNIT_ROWS
    shards = [
        write_shard(folder, index, rows[start : start + step]) for index, start in enumerate(range(0, len(rows), step))
    ]
    manifest = Manifest(folder, tuple(shards))
    write_manifest(manifest)
    return manifest


def pack_crops(photos: Photos, folder: Path, units: int, *, seed: int) -> Manifest:
    """Write a data set of crops of the photos into an empty folder."""
    return write_crops(encoded_crops(photos, CASE, units * UNIT_ROWS, seed), str(folder))
