"""The manifest: which shards make a data set, in one Parquet file of one row a shard.

Training never lists a bucket and never opens a footer it does not need: everything the plan wants is here. A sample's
id is its position in the manifest, a stable 64-bit number. The fingerprint is a hash of all that decides the order
and the content of samples; a run refuses to continue over a manifest with another one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.errors import DataError

MANIFEST_NAME = "manifest.parquet"
FORMAT = 1
#: Rows of one unit, the smallest piece that is read alone: 64 images of 100 KB are one range read of 6 MB.
UNIT_ROWS = 64

_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("kind", pa.string()),
        ("etag", pa.string()),
        ("bytes", pa.int64()),
        ("rows_per_group", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Shard:
    """One stored file of rows."""

    uri: str
    """Path relative to the manifest's folder, or a full URI."""
    kind: str
    """How it is read; `parquet` is the canonical kind."""
    etag: str
    """Digest of its content; part of the fingerprint. Reading compares the size only, which costs nothing."""
    bytes: int
    rows_per_group: tuple[int, ...]
    """Rows of each Parquet row group."""

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(self.rows_per_group)


@dataclass(frozen=True)
class Manifest:
    """A data set, read-only."""

    folder: str
    """Where the manifest lies; relative shard paths start here."""
    shards: tuple[Shard, ...]
    unit_rows: int = UNIT_ROWS
    image_column: str = "image"
    classes: tuple[str, ...] = ()
    """Names of the labels, empty for unlabelled data."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What it was made from: licence, command, counts of rejected files. Informative only."""

    @property
    def rows(self) -> int:
        """Samples of the data set."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the order and content of samples; the folder is not part of it."""
        identity = [FORMAT, self.unit_rows, self.image_column]
        shards = [[s.uri, s.kind, s.etag, s.bytes, list(s.rows_per_group)] for s in self.shards]
        return storage.digest(json.dumps([identity, shards], separators=(",", ":")).encode())

    def shard_uri(self, index: int) -> str:
        """Full URI of a shard."""
        return storage.join(self.folder, self.shards[index].uri)

    def first_sample_ids(self) -> np.ndarray:
        """Id of the first sample of each shard, int64."""
        rows = np.array([0, *(shard.rows for shard in self.shards)], dtype=np.int64)
        return np.cumsum(rows)[:-1]


def write_manifest(manifest: Manifest) -> str:
    """Write the manifest into its folder and return its URI. Call once, last: it is the data set's commit marker."""
    shards = manifest.shards
    table = pa.table(
        {
            "uri": [s.uri for s in shards],
            "kind": [s.kind for s in shards],
            "etag": [s.etag for s in shards],
            "bytes": [s.bytes for s in shards],
            "rows_per_group": [list(s.rows_per_group) for s in shards],
        },
        schema=_SCHEMA,
    )
    header = {
        "format": FORMAT,
        "unit_rows": manifest.unit_rows,
        "image_column": manifest.image_column,
        "classes": list(manifest.classes),
        "source": dict(manifest.source),
        "fingerprint": manifest.fingerprint,
    }
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"simclr_ray": json.dumps(header)}), buffer, compression="zstd")
    uri = storage.join(manifest.folder, MANIFEST_NAME)
    storage.write_bytes(uri, buffer.getvalue())
    return uri


def read_manifest(folder: str) -> Manifest:
    """Read the manifest of a packed data set.

    Args:
        folder: The data set's folder, or the URI of its manifest.

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
        table = pq.read_table(io.BytesIO(data))
        header = json.loads((table.schema.metadata or {})[b"simclr_ray"])
        if header["format"] <= FORMAT:
            manifest = _from_table(folder, header, table)
            intact = manifest.fingerprint == header["fingerprint"]
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


def _from_table(folder: str, header: Mapping[str, Any], table: pa.Table) -> Manifest:
    """The inverse of `write_manifest`; KeyError, TypeError or ValueError for what that never wrote."""
    columns = [table.column(name).to_pylist() for name in _SCHEMA.names]
    return Manifest(
        folder=folder,
        shards=tuple(Shard(u, k, e, b, tuple(r)) for u, k, e, b, r in zip(*columns, strict=True)),
        unit_rows=header["unit_rows"],
        image_column=header["image_column"],
        classes=tuple(header["classes"]),
        source=header["source"],
    )


def shard_from_file(uri: str, data: bytes, rows_per_group: Sequence[int]) -> Shard:
    """Describe a shard that was just written as `data` at `uri` (relative)."""
    return Shard(uri, "parquet", storage.digest(data), len(data), tuple(rows_per_group))
