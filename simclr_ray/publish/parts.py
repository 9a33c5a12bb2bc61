"""Files of embeddings: which images each holds, how it is written, and how one that lies there is looked at.

Part k of a data set holds the embeddings of a run of its units, sample ids [first, stop), and is named by them. It is
written whole or not at all, and its footer says of which work it is a part and which of its images did not decode, so
a folder of parts needs no other bookkeeping: what is missing is what has no file.

```
sample_id  int64            position in the data set
uri        string           of the image, or shard and place in it
vector     fixed_size_list  float16 or float32, one length for all
label      int64            only where the data set has labels; null where an image has none
```
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data.footer import SEAL_BYTES, is_damaged, is_sealed, seal
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.read import RowRange, resolve

Dtype = Literal["float16", "float32"]
Vectors = npt.NDArray[np.floating[Any]]

_NAME = re.compile(r"^embeddings-(\d{12,})-(\d{12,})\.parquet$")
_KEY = b"simclr_ray"
_TAIL = 1 << 16
"""Bytes read from a file's end at first: nearly every footer is shorter."""


class Part(NamedTuple):
    """Consecutive images whose embeddings share a file."""

    first: int
    """Sample id of the first."""
    stop: int

    @property
    def name(self) -> str:
        """File name; names sort as the ids do."""
        return f"embeddings-{self.first:012d}-{self.stop:012d}.parquet"

    @property
    def images(self) -> int:
        """Images of the data set in it, also those that do not decode."""
        return self.stop - self.first


class RejectedImage(NamedTuple):
    """An image without an embedding."""

    sample_id: int
    uri: str
    reason: str
    detail: str


@dataclass(frozen=True)
class PartNote:
    """What the footer of a part says."""

    work: str
    """Digest of what decides the vectors."""
    first: int
    stop: int
    rejected: tuple[RejectedImage, ...]


@dataclass(frozen=True)
class Embedded:
    """The rows of a part."""

    sample_ids: Sequence[int]
    uris: Sequence[str]
    labels: Sequence[int | None]
    vectors: Vectors
    """(n, D) of the dtype to store."""


class FoundPart(NamedTuple):
    """A part that is there and whole."""

    note: PartNote
    rows: int
    """Embeddings in it."""
    bytes: int


def cut(rows: int, rows_per_part: int) -> list[Part]:
    """The parts of a data set, in order: every image is in exactly one."""
    return [Part(first, min(rows, first + rows_per_part)) for first in range(0, rows, rows_per_part)]


def part_of(name: str) -> Part | None:
    """The part that a file name stands for; None for other files."""
    match = _NAME.match(name)
    return Part(int(match[1]), int(match[2])) if match else None


def ranges_of(manifest: Manifest, part: Part) -> Iterator[RowRange]:
    """Where the images of a part are stored, in order of their ids."""
    firsts = manifest.table.first_rows
    shard = int(np.searchsorted(firsts, part.first, side="right")) - 1
    while shard < len(manifest.table) and int(firsts[shard]) < part.stop:
        begin = int(firsts[shard])
        for group, rows in enumerate(manifest.table.groups_of(shard).tolist()):
            start, stop = max(part.first, begin), min(part.stop, begin + rows)
            if start < stop:
                yield resolve(manifest, Piece(shard, group, start - begin, stop - begin, start))
            begin += rows
        shard += 1


def to_parquet(embedded: Embedded, note: PartNote, *, labelled: bool) -> bytes:
    """The file of a part; its pages and footer carry checksums."""
    width = embedded.vectors.shape[1]
    columns = {
        "sample_id": pa.array(embedded.sample_ids, pa.int64()),
        "uri": pa.array(embedded.uris, pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(embedded.vectors.reshape(-1)), width),
    }
    if labelled:
        columns["label"] = pa.array(embedded.labels, pa.int64())
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(asdict(note))})
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression={"sample_id": "zstd", "uri": "zstd", "vector": "none", "label": "zstd"},
        use_dictionary=False, write_statistics=["sample_id"], write_page_checksum=True,
    )  # fmt: skip
    return seal(buffer.getvalue())


def look_at_part(uri: str) -> FoundPart | None:
    """Read the footer of a part's file.

    Returns:
        None when there is no file, or none that is whole: its footer is damaged or was not written by `to_parquet`.

    Raises:
        StorageError: the store fails.
    """
    try:
        size = storage.stat(uri).bytes
        tail = storage.read_range(uri, max(0, size - _TAIL), size)
        footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        wanted = footer_bytes + SEAL_BYTES
        if tail[-4:] != b"PAR1" or wanted > size:
            return None
        if wanted > len(tail):
            tail = storage.read_range(uri, size - wanted, size)
    except (FileNotFoundError, storage.OutOfRangeError):
        return None
    footer = tail[-footer_bytes:]
    before = tail[-wanted:-footer_bytes]
    if not is_sealed(before) or is_damaged(before, footer):
        return None
    try:
        # A Parquet file of a footer alone: enough for its metadata, and nothing else is looked at.
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
        said = json.loads((metadata.metadata or {})[_KEY])
        rejected = tuple(RejectedImage(*one) for one in said["rejected"])
        note = PartNote(said["work"], said["first"], said["stop"], rejected)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
    whole = metadata.num_rows + len(rejected) == note.stop - note.first
    return FoundPart(note, metadata.num_rows, size) if whole else None


def read_part(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a part, or some columns of them."""
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=columns, page_checksum_verification=True)


def vectors_of(table: pa.Table) -> npt.NDArray[np.float32]:
    """The column `vector` as (n, D) float32."""
    column = table["vector"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    width = column.type.list_size
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float32).reshape(-1, width)
