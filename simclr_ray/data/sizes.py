"""What images weigh, before they are read: the mean of loose ones, and how often training reads a stored byte."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simclr_ray import storage
from simclr_ray.data.manifest import Manifest

SAMPLES = 256
"""Images of a list that are asked for their size: the mean of photographs is then known within some percent."""
_READERS = 16


class Sizes:
    """The mean size of listed images; of those whose sizes the list does not know, some from all over it are asked."""

    def __init__(self, rows: int) -> None:
        """Args: rows: Of the whole list, about."""
        self._every = max(1, rows // SAMPLES)
        self._rows = self._count = self._bytes = 0
        self._unknown: list[str] = []

    def seen(self, table: pa.Table) -> pa.Table:
        """Note the entries of a part of the list, in `listing.SCHEMA`; the same table."""
        sizes = table["bytes"]
        self._count += len(sizes) - sizes.null_count
        self._bytes += pc.sum(sizes).as_py() or 0
        chosen = np.arange(-self._rows % self._every, len(table), self._every)
        self._rows += len(table)
        if sizes.null_count and len(self._unknown) < 2 * SAMPLES:
            some = table.select(["uri", "bytes"]).take(chosen)
            self._unknown += some.filter(some["bytes"].is_null())["uri"].to_pylist()
        return table

    def mean(self) -> int | None:
        """Bytes of an image, at least 1; None where there is none, or none of those asked for is there.

        Raises:
            StorageError: the store fails.
        """
        with ThreadPoolExecutor(_READERS, thread_name_prefix="sizes") as pool:
            found = [size for size in pool.map(_size, self._unknown) if size is not None]
        count = self._count + len(found)
        return max(1, (self._bytes + sum(found)) // count) if count else None


def _size(uri: str) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return storage.stat(uri).bytes
    return None


def reads_of_a_byte(manifest: Manifest) -> float:
    """Bytes that an epoch reads for each byte of images stored, if the images of a row group weigh the same.

    A unit of R rows reads the whole of each Parquet row group that it takes rows from. So a group of G rows is read
    once for each full unit, and once more for what is left of it. Groups of tars are units already, and loose images
    are read alone.
    """
    table = manifest.table
    if not manifest.rows or table.text("kind", 0) != "parquet":
        return 1.0
    unit_rows = manifest.unit_rows
    read = table.sums_by_shard(lambda rows: rows * (rows // unit_rows + (rows % unit_rows > 0)))
    return float(read.sum() / manifest.rows)
