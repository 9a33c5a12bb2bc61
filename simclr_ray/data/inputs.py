"""Rows of an indexed source as packing wants them: the encoded image, its label, and a name to find it by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray.data.decode import REASONS
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.ranges import LostShard
from simclr_ray.data.read import LOST, RowRange, read_range
from simclr_ray.data.read_tar import KEY
from simclr_ray.data.sources import StoredFile
from simclr_ray.data.units import BYTES_AHEAD, read_ahead


class Row(NamedTuple):
    """One row of the source."""

    sample_id: int
    """Position in the source's manifest."""
    image: bytes | None
    label: int | None
    uri: str
    """Address of a loose image; of others the shard's, and the key or place in it after a #."""
    lost: str
    """Why the image could not be read, or nothing."""


@dataclass(frozen=True)
class Columns:
    """What is read of each shard of a source."""

    image: str
    label: str | None
    uri: str | None
    """Column that names each row, if there is one."""
    classes: tuple[str, ...]
    """Labels that are text are numbered by this."""


def columns_of(manifest: Manifest, label: str | None) -> Columns:
    """Which columns the shards of a source have.

    Args:
        manifest: Of the source.
        label: Column of labels, or of `.cls` members of tars; None where they are not wanted.

    Raises:
        StorageError: the first shard cannot be read.
    """
    kind = manifest.table.text("kind", 0) if len(manifest.table) else "parquet"
    if kind == "objects":
        return Columns(manifest.image_column, label if manifest.classes else None, "uri", manifest.classes)
    if kind == "tar":
        return Columns(manifest.image_column, label and "label", KEY, manifest.classes)
    names = pq.read_schema(StoredFile(manifest.shard_uri(0))).names
    return Columns(
        manifest.image_column, label if label in names else None, "uri" if "uri" in names else None, manifest.classes
    )


def read_inputs(ranges: Sequence[RowRange], columns: Columns) -> Iterator[Row]:
    """Rows of some ranges, in order; the next ranges are read meanwhile, about `BYTES_AHEAD` of them or one.

    Raises:
        DataError: a shard is another one than was indexed.
        StorageError: the store fails.
    """
    ahead = read_ahead(ranges, lambda one: _rows(one, columns), cost=lambda one: one.bytes_about, max_cost=BYTES_AHEAD)
    for rows in ahead:
        yield from rows


def _rows(where: RowRange, columns: Columns) -> list[Row]:
    wanted = [name for name in (columns.image, columns.label, columns.uri) if name is not None]
    names = [f"{where.source.uri}#{where.group}/{row}" for row in range(where.start, where.stop)]
    try:
        table = read_range(where, wanted, columns.image)
    except LostShard as lost:
        return [Row(int(i), None, None, name, lost.reason) for i, name in zip(where.sample_ids, names, strict=True)]
    if columns.uri is not None:
        own = table[columns.uri].to_pylist()
        names = [f"{where.source.uri}#{key}" for key in own] if columns.uri == KEY else [str(uri) for uri in own]
    labels = _labels(table[columns.label], columns) if columns.label else [None] * table.num_rows
    lost_codes = table[LOST].to_pylist()
    return [
        Row(int(sample), image, label, name, REASONS[code] if code >= 0 else "")
        for sample, image, label, name, code in zip(
            where.sample_ids, table[columns.image].to_pylist(), labels, names, lost_codes, strict=True
        )
    ]


def _labels(values: pa.ChunkedArray, columns: Columns) -> list[int | None]:
    numbers = {name: number for number, name in enumerate(columns.classes)}

    def number(value: Any) -> int | None:
        if isinstance(value, str):
            return numbers.get(value)
        return int(value) if value is not None and int(value) >= 0 else None

    return [number(value) for value in values.to_pylist()]
