"""Read rows of shards of any kind: what a piece of a unit is in bytes, and those bytes as a table.

A `RowRange` holds all that reading takes, so that whoever reads needs neither manifest nor plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from simclr_ray.data import read_objects, read_parquet, read_tar
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.ranges import Source
from simclr_ray.errors import DataError

LOST = read_objects.LOST
IMAGE_BYTES = "image_bytes"
"""Entry of a manifest's `source`: mean bytes of a loose image."""
_OBJECT_BYTES = 128 << 10
"""Guess at a loose image where the manifest does not say."""


class RowRange(NamedTuple):
    """Consecutive rows of one group of one shard, and where to find them."""

    source: Source
    group: int
    group_rows: int
    """Rows of the whole group."""
    start: int
    """First row wanted, counted in the group."""
    stop: int
    first_sample_id: int
    """Id of the row at `start`."""
    begin: int | None
    """`parquet`, `objects`: where the footer starts, if that is known. `tar`: where the group does."""
    end: int
    """Where that ends."""
    bytes_about: int
    """What reading it brings into memory, more or less."""

    @property
    def rows(self) -> int:
        """Rows wanted."""
        return self.stop - self.start

    @property
    def sample_ids(self) -> np.ndarray:
        """Ids of the rows, int64."""
        return np.arange(self.first_sample_id, self.first_sample_id + self.rows, dtype=np.int64)


def resolve(manifest: Manifest, piece: Piece) -> RowRange:
    """Where the rows of a piece are.

    Raises:
        DataError: the manifest does not say where a tar's groups are.
    """
    table, shard = manifest.table, piece.shard
    size, kind = int(table.bytes[shard]), table.text("kind", shard)
    source = Source(manifest.shard_uri(shard), kind, size, manifest.shard_version(shard), manifest.ours)
    offsets = table.offsets_of(shard)
    group_rows = int(table.groups_of(shard)[piece.group])
    begin, end = int(offsets[0]) if len(offsets) else None, size
    about = size * group_rows // max(1, int(table.first_rows[shard + 1] - table.first_rows[shard]))
    if kind == "objects":
        about = object_bytes(manifest) * (piece.stop - piece.start)
    if kind == "tar":
        if len(offsets) != len(table.groups_of(shard)) + 1:
            raise DataError("the manifest does not say where the groups of a tar are", where=source.uri,
                            fix="index the images again")  # fmt: skip
        begin, end = (int(offset) for offset in offsets[piece.group : piece.group + 2])
        about = end - begin
    return RowRange(source, piece.group, group_rows, piece.start, piece.stop, piece.first_sample_id, begin, end, about)


def object_bytes(manifest: Manifest) -> int:
    """Mean bytes of a data set's loose images, as far as it is known; at least 1."""
    source = manifest.source
    if IMAGE_BYTES in source:
        return max(1, int(source[IMAGE_BYTES]))
    if source.get("bytes") and source.get("files"):
        return max(1, int(source["bytes"]) // int(source["files"]))
    return _OBJECT_BYTES


def read_range(rows: RowRange, columns: Sequence[str], image_column: str) -> pa.Table:
    """Rows of one group in stored order.

    Args:
        rows: Which.
        columns: Of the shard; the images are `image_column` whatever a tar calls them.
        image_column: The one that holds encoded images.

    Returns:
        The columns, then `sample_id`, and `lost_reason`: -1, or the number in `REASONS` of an image that could not be
        read though its shard could, which is null then.

    Raises:
        LostShard: the shard is gone or damaged, or the group is too large.
        DataError: it is another shard than the manifest's, or a column is missing or of another type.
        StorageError: the store fails.
    """
    wanted = slice(rows.start, rows.stop)
    group = rows.source, rows.group, rows.group_rows, columns
    if rows.source.kind == "tar":
        assert rows.begin is not None
        table = read_tar.read_group(*group, start=rows.begin, stop=rows.end, images=image_column)[wanted]
    elif rows.source.kind == "objects":
        table = read_objects.read_group(*group, footer=rows.begin, images=image_column, wanted=wanted)
    else:
        table = read_parquet.read_group(*group, footer=rows.begin, images=image_column)[wanted]
    if LOST not in table.column_names:
        table = table.append_column(LOST, pa.array(np.full(rows.rows, -1, np.int8)))
    return (
        table.select([*columns])
        .append_column("sample_id", pa.array(rows.sample_ids))
        .append_column(LOST, table.column(LOST))
    )


def read_rows(manifest: Manifest, pieces: Sequence[Piece], columns: Sequence[str]) -> pa.Table:
    """Rows of the pieces in their stored order, with a `sample_id` column.

    Raises:
        DataError: naming the shard, when it is missing, broken, changed or lacks a column.
        StorageError: the store fails.
    """
    tables = [read_range(resolve(manifest, piece), columns, manifest.image_column) for piece in pieces]
    return pa.concat_tables(tables).drop_columns(LOST)
