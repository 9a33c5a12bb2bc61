"""The manifest: which shards make a data set, in one Parquet file of one row a shard.

Training never lists a bucket and never opens a footer it does not need: everything the plan wants is here. A sample's
id is its position in the manifest, a stable 64-bit number. The fingerprint is a hash of all that decides the order
and the content of samples; a run refuses to continue over a manifest with another one.

In memory a manifest stays in columns, as it is stored (`shard_table.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data.shard_table import KINDS, SCHEMA, Int64s, Kind, Shard, ShardTable
from simclr_ray.errors import DataError

__all__ = [
    "FORMAT",
    "KINDS",
    "MANIFEST_NAME",
    "FEWEST_UNITS",
    "UNIT_ROWS",
    "Kind",
    "Manifest",
    "Shard",
    "ShardTable",
    "read_manifest",
    "shard_from_file",
    "unit_rows_for",
    "write_manifest",
]

MANIFEST_NAME = "manifest.parquet"
FORMAT = 2
#: Rows of one unit, the smallest piece that is read alone: 64 images of 100 KB are one range read of 6 MB.
UNIT_ROWS = 64
FEWEST_UNITS = 256
"""Of an epoch, at least, where a data set is packed. Images of a unit always meet in a step: in steps of four of 22
units, kNN accuracy was 1.3 points lower than in steps of 64 of 358 and that of a linear probe not measurably another
(benchmarks/quality.py); where between them 256 lies was not measured."""
_SHARDS_AT_ONCE = 1024
"""Shards of one row group of the manifest. Arrow takes several times the memory of what it reads at once."""


def unit_rows_for(rows: int) -> int:
    """Rows of a unit for a data set that is packed: 64, and halves of it for fewer than 16,384 images."""
    unit_rows = UNIT_ROWS
    while unit_rows > 1 and rows < FEWEST_UNITS * unit_rows:
        unit_rows //= 2
    return unit_rows


@dataclass(frozen=True)
class Manifest:
    """A data set, read-only."""

    folder: str
    """Where the manifest lies; relative shard paths start here."""
    shards: Sequence[Shard]
    """Given as any sequence, kept as a `ShardTable`."""
    unit_rows: int = UNIT_ROWS
    image_column: str = "image"
    """Column of the encoded images of `parquet` shards; `image.bytes` is field `bytes` of struct `image`."""
    classes: tuple[str, ...] = ()
    """Names of the labels, empty for unlabelled data."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What it was made from: licence, command, counts of rejected files. Informative only."""
    home: str | None = field(default=None, compare=False)
    """Where it was written; None before that. Elsewhere it is a copy, whose shards have other versions."""
    ours: bool = field(default=True, compare=False)
    """Made by this command. One that was found in a store may be by anybody, and names no files of this machine."""

    def __post_init__(self) -> None:
        """Put the shards into columns."""
        object.__setattr__(self, "shards", ShardTable.of(self.shards))

    @property
    def table(self) -> ShardTable:
        """The shards in columns."""
        assert isinstance(self.shards, ShardTable)
        return self.shards

    @property
    def rows(self) -> int:
        """Samples of the data set."""
        return int(self.table.first_rows[-1])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the order and content of samples; the folder is not part of it."""
        hasher = hashlib.blake2b(digest_size=16)
        hasher.update(json.dumps([FORMAT, self.unit_rows, self.image_column], separators=(",", ":")).encode())
        self.table.update(hasher)
        return hasher.hexdigest()

    def shard_uri(self, index: int) -> str:
        """Full URI of a shard.

        Raises:
            DataError: the data set lies in a store and names a file of this machine.
        """
        join = storage.join if self.ours else storage.join_named
        return join(self.folder, self.table.text("uri", index))

    def shard_version(self, index: int) -> str | None:
        """The version that a shard must have in the store; None where it cannot be known, as for a copy."""
        copied = self.home not in (None, self.folder)
        uri = self.table.text("uri", index)
        return None if copied and storage.join(self.folder, uri) != uri else self.table.version(index)

    def first_sample_ids(self) -> Int64s:
        """Id of the first sample of each shard, int64."""
        return self.table.first_rows[:-1]


def write_manifest(manifest: Manifest) -> str:
    """Write the manifest into its folder and return its URI. Call once, last: it is the data set's commit marker."""
    header = {
        "format": FORMAT,
        "unit_rows": manifest.unit_rows,
        "image_column": manifest.image_column,
        "classes": list(manifest.classes),
        "source": dict(manifest.source),
        "home": storage.normalise(manifest.folder),
        "fingerprint": manifest.fingerprint,
    }
    table = manifest.table.as_arrow().replace_schema_metadata({"simclr_ray": json.dumps(header)})
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", write_statistics=False, row_group_size=_SHARDS_AT_ONCE,
        use_dictionary=["kind", "rows_per_group.list.element"],
        # Offsets grow by a group's size each, so their differences take half the bytes or less.
        column_encoding={"offsets.list.element": "DELTA_BINARY_PACKED"},
    )  # fmt: skip
    uri = storage.join(manifest.folder, MANIFEST_NAME)
    storage.write_bytes(uri, buffer.getvalue())
    return uri


def read_manifest(folder: str, *, ours: bool = False) -> Manifest:
    """Read the manifest of a packed data set.

    Args:
        folder: The data set's folder, or the URI of its manifest.
        ours: It was written by the command that reads it.

    Raises:
        DataError: when there is none, it is not ours, or its content does not match its own fingerprint.
    """
    folder = storage.normalise(folder).removesuffix("/" + MANIFEST_NAME)
    uri = storage.join(folder, MANIFEST_NAME)
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise DataError(
            "no data set here: manifest.parquet is missing",
            where=folder,
            fix="make one from images with: simclr-ray pack FOLDER " + folder,
        ) from None
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        header = json.loads((file.schema_arrow.metadata or {})[b"simclr_ray"])
        if header["format"] <= FORMAT:
            manifest = _from_file(folder, header, file, ours=ours)
            intact = _fingerprint(manifest, header["format"]) == header["fingerprint"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"not a manifest of this project: {error}", where=uri, fix="pack or index the images again"
        ) from None
    if header["format"] > FORMAT:
        raise DataError(
            "written by a newer version", where=uri, got=f"format {header['format']}", expected=f"at most {FORMAT}"
        )
    if not intact:
        raise DataError("content does not match its own fingerprint", where=uri, fix="pack or index the images again")
    return manifest


def shard_from_file(uri: str, data: bytes, rows_per_group: Sequence[int], *, version: str | None = None) -> Shard:
    """Describe a Parquet shard that was just written as `data` at `uri` (relative)."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return Shard(uri, "parquet", storage.digest(data), len(data), tuple(rows_per_group), (footer,), version)


def _from_file(folder: str, header: Mapping[str, Any], file: pq.ParquetFile, *, ours: bool) -> Manifest:
    """The inverse of `write_manifest`; KeyError, TypeError or ValueError for what that never wrote."""

    def parts() -> Iterator[ShardTable]:
        for group in range(file.num_row_groups):
            yield ShardTable.from_arrow(_checked(file.read_row_group(group, use_threads=False), header["format"]))
        pa.default_memory_pool().release_unused()  # or the process would keep what the reading took

    shards = ShardTable.gather(
        parts(), groups=_num_values(file, "rows_per_group"), offsets=_num_values(file, "offsets")
    )
    return Manifest(
        folder=folder,
        shards=shards,
        unit_rows=_count(header["unit_rows"]),
        image_column=str(header["image_column"]),
        classes=tuple(header["classes"]),
        source=header["source"],
        home=header.get("home", folder),
        ours=ours,
    )


def _checked(table: pa.Table, format_: int) -> pa.Table:
    """A part of a manifest's table, of whatever format it was written in."""
    if format_ == 1:  # row groups alone, and no footer's place: it is looked up when a shard is opened
        empty = pa.array([[]] * len(table), SCHEMA.field("offsets").type)
        table = table.rename_columns(["digest" if name == "etag" else name for name in table.column_names])
        table = table.append_column("version", pa.nulls(len(table), pa.string())).append_column("offsets", empty)
    for name in SCHEMA.names:
        column = table.column(name)
        if column.null_count and name != "version":
            raise ValueError(f'column "{name}" holds nulls')
        if column.type.id != SCHEMA.field(name).type.id:
            raise TypeError(f'column "{name}" is {column.type}')
    unknown = set(table.column("kind").unique().to_pylist()) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown kind of shard {sorted(unknown)[0]!r}")
    return table


def _num_values(file: pq.ParquetFile, column: str) -> int:
    """Values of a column of lists, or more: an empty list counts as one."""
    groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(int(chunk.num_values) for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _fingerprint(manifest: Manifest, format_: int) -> str:
    """As a manifest of this format states it; format 1 hashed JSON."""
    if format_ != 1:
        return manifest.fingerprint
    identity = [1, manifest.unit_rows, manifest.image_column]
    shards = [[s.uri, s.kind, s.digest, s.bytes, list(s.rows_per_group)] for s in manifest.shards]
    return storage.digest(json.dumps([identity, shards], separators=(",", ":")).encode())


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"not a number of rows: {value!r}")
    return value
