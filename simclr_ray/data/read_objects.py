"""Loose images by a stored list of them: a row group of the list, then all its images at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pyarrow as pa

from simclr_ray import storage
from simclr_ray.data import ranges, read_parquet
from simclr_ray.data.decode import REASONS, Reason
from simclr_ray.data.ranges import LostShard, Source
from simclr_ray.data.tar import IMAGE_BYTES

LOST = "lost_reason"
"""Column of the numbers in `REASONS` of images that could not be read, -1 for those that were."""
_LIST_COLUMNS = ("uri", "bytes", "version")
_UNKNOWN = -1
_READERS = 16


def read_group(
    source: Source, group: int, rows: int, columns: Sequence[str], *, footer: int | None, images: str,
    wanted: slice = slice(None),
) -> pa.Table:  # fmt: skip
    """Loose images of one group of a list.

    Args:
        source: The list.
        group: Number of its row group.
        rows: Rows of the group, as the manifest knows.
        columns: `images`, or any column of the list.
        footer: Where the list's footer starts, if that is known.
        images: What the column of images is called.
        wanted: Rows of the group that are read; the others are left out of the result.

    Returns:
        The columns, and `LOST` if the images are among them.

    Raises:
        LostShard: the list itself is gone or damaged.
        DataError: the list is another one than the manifest's, has no such column, or an image has another version.
        StorageError: the store fails.
    """
    listed = [name for name in columns if name != images]
    if images in columns:
        listed += [name for name in _LIST_COLUMNS if name not in listed]
    table = read_parquet.read_group(source, group, rows, listed, footer=footer)[wanted]
    if images in columns:
        entries = [_source(row, source) for row in table.select(_LIST_COLUMNS).to_pylist()]
        encoded, reasons = zip(*_pool().map(_read, entries), strict=True) if entries else ((), ())
        table = table.append_column(images, pa.array(encoded, pa.binary()))
        return table.select([*columns]).append_column(LOST, pa.array(reasons, pa.int8()))
    return table.select([*columns])


def _source(row: dict[str, object], listed: Source) -> Source:
    """The object of a row; a relative URI starts at the list's folder, and is copied along with it."""
    uri, version = str(row["uri"]), row["version"]
    join = storage.join if listed.ours else storage.join_named
    absolute = join(listed.uri.rpartition("/")[0], uri)
    if absolute != uri and listed.version is None:
        version = None
    size = row["bytes"] if isinstance(row["bytes"], int) else _UNKNOWN
    return Source(absolute, ranges.IMAGE, size, None if version is None else str(version))


def _read(entry: Source) -> tuple[bytes | None, int]:
    """An image and -1, or nothing and the number of the reason."""
    try:
        asked = entry.bytes == _UNKNOWN
        if asked:
            entry = entry._replace(bytes=storage.stat(entry.uri).bytes)
        if entry.bytes > IMAGE_BYTES:
            return None, _code("too_large")
        if not asked or entry.version is not None:
            ranges.verify(entry)
        return ranges.read(entry, 0, entry.bytes), -1
    except FileNotFoundError:
        return None, _code("shard_missing")
    except LostShard as lost:
        return None, _code(lost.reason)


def _code(reason: Reason) -> int:
    return REASONS.index(reason)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Threads of this process for single images."""
    return ThreadPoolExecutor(_READERS, thread_name_prefix="object")
