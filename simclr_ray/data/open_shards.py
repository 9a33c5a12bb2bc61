"""Open shards that were made elsewhere and describe them for a manifest: tars by their headers, Parquet by its footer.

A shard that cannot be used is a value here, not an exception: one bad file among 100,000 is left out and listed. Only
what is wrong with a whole data set's layout ends the work, such as samples whose members are not neighbours.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data import tar
from simclr_ray.data.listing import write_table
from simclr_ray.data.ranges import GROUP_BYTES
from simclr_ray.data.read_parquet import is_image
from simclr_ray.data.sources import StoredFile

THREADS = 8
_TAIL_BYTES = 64 << 10
_END = b"PAR1"
_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))


@dataclass(frozen=True)
class Opened:
    """A shard as it was found; `reason` is empty where it can be used."""

    uri: str
    bytes: int = 0
    version: str | None = None
    digest: str = ""
    """The store's version; of local files a digest of what was read to describe them."""
    rows_per_group: Sequence[int] = ()
    offsets: Sequence[int] = ()
    rows: int = 0
    """Images of the shard."""
    without_image: int = 0
    too_large: int = 0
    requests: int = 0
    read: int = 0
    """Bytes read to describe it."""
    reason: str = ""
    detail: str = ""
    """Why it is left out, or only in part used."""
    columns: Sequence[str] = ()
    """`parquet`: columns that can hold images, by path."""
    all_columns: str = ""
    """`parquet`: all columns, in words."""
    label_names: Sequence[str] = ()
    """`parquet`: names of the classes, where the file tells them, or the labels themselves where they are text."""
    text_labels: bool = False
    """Whether `label_names` are the labels themselves, in no order that means anything."""
    too_large_columns: Sequence[str] = field(default=())
    """`parquet`: columns of which a row group is too large to be read."""


SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("bytes", pa.int64()),
        ("version", pa.string()),
        ("digest", pa.string()),
        ("rows_per_group", pa.list_(pa.int32())),
        ("offsets", pa.list_(pa.int64())),
        ("rows", pa.int64()),
        ("without_image", pa.int64()),
        ("too_large", pa.int64()),
        ("requests", pa.int64()),
        ("read", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("columns", pa.list_(pa.string())),
        ("all_columns", pa.string()),
        ("label_names", pa.list_(pa.string())),
        ("text_labels", pa.bool_()),
        ("too_large_columns", pa.list_(pa.string())),
    ]
)


def open_batch(uris: Sequence[str], kind: str, unit_rows: int, label_column: str | None, note: str) -> None:
    """Open some shards at once and write what was found to `note`.

    Args:
        uris: Of the shards. Their size and version are looked up again: one may have been mended since it was listed.
        kind: `tar` or `parquet`.
        unit_rows: Images of a tar's group.
        label_column: Column of a Parquet file that holds labels, if they are wanted.
        note: URI of the table to write.

    Raises:
        DataError: samples of a tar are not told apart by their keys.
        StorageError: the store fails.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="open") as pool:
        opened = list(pool.map(lambda uri: open_shard(uri, kind=kind, unit_rows=unit_rows, labels=label_column), uris))
    write_table(note, pa.Table.from_pylist([asdict(one) for one in opened], schema=SCHEMA))


def open_shard(uri: str, *, kind: str, unit_rows: int, labels: str | None = None) -> Opened:
    """Describe one shard; see `open_batch`."""
    size, version = 0, None
    try:
        found = storage.stat(uri)
        size, version = found.bytes, found.version
        return _open_tar(uri, size, version, unit_rows) if kind == "tar" else _open_parquet(uri, size, version, labels)
    except FileNotFoundError:
        return Opened(uri, reason="shard_missing", detail="it is gone since it was listed")
    except (storage.OutOfRangeError, storage.ChangedError) as error:
        return Opened(uri, size, version, reason="shard_unreadable", detail=f"it is being written: {error}")


def _open_tar(uri: str, size: int, version: str | None, unit_rows: int) -> Opened:
    read = tar.Windows(uri, size, version)
    head = bytes(read(0, min(size, 8)))
    packed = next((name for signature, name in _COMPRESSED if head.startswith(signature)), None)
    if packed is not None:
        detail = f"compressed by {packed}, so that no part of it can be read alone; unpack it to a plain .tar"
        return Opened(uri, size, version, reason="shard_unreadable", detail=detail)
    seen = _Digest()
    groups = tar.groups(seen.of(tar.walk(read, size)), unit_rows, where=uri)
    reason, detail = "", ""
    if groups.damage is not None:
        used = f"its first {groups.rows:,} samples are used" if groups.rows else "no sample before that"
        reason, detail = "shard_truncated" if groups.rows else "shard_unreadable", f"{groups.damage}; {used}"
    return Opened(
        uri, size, version, version or seen.hexdigest(), groups.rows_per_group, groups.offsets, groups.rows,
        groups.without_image, groups.too_large, read.requests, read.bytes, reason, detail,
    )  # fmt: skip


class _Digest:
    """Of the names, places and sizes of a tar's members."""

    def __init__(self) -> None:
        self._hasher = hashlib.blake2b(digest_size=16)

    def of(self, members: Iterable[tar.Member]) -> Iterator[tar.Member]:
        for member in members:
            self._hasher.update(f"{member.data} {member.size} {member.name}\0".encode("utf-8", "surrogateescape"))
            yield member

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


def _open_parquet(uri: str, size: int, version: str | None, labels: str | None) -> Opened:
    def useless(detail: str) -> Opened:
        return Opened(uri, size, version, reason="shard_unreadable", detail=detail, requests=1, read=len(tail))

    start = max(0, size - _TAIL_BYTES)
    tail = storage.read_range(uri, start, size, version=version)
    if len(tail) < 12 or not tail.endswith(_END):
        return useless(f"it does not end as a Parquet file does: {tail[-4:]!a}")
    footer = size - 8 - int.from_bytes(tail[-8:-4], "little")
    if footer < 4:
        return useless("its footer claims to be larger than the file")
    requests = 1
    if footer < start:
        tail, requests = storage.read_range(uri, footer, size, version=version), 2
    try:
        metadata = pq.read_metadata(io.BytesIO(tail))
        names = _columns(metadata)
        label_names, text_labels = _label_names(uri, metadata, labels)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        too_large = [path for path, leaf in names.items() if any(_bytes(group, leaf) > GROUP_BYTES for group in groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        return useless(f"its footer cannot be read: {error}")
    return Opened(
        uri, size, version, version or storage.digest(tail[-(size - footer) :]), [group.num_rows for group in groups],
        [footer], metadata.num_rows, requests=requests, read=len(tail), columns=list(names),
        all_columns=_in_words(metadata), label_names=label_names, text_labels=text_labels, too_large_columns=too_large,
    )  # fmt: skip


def _bytes(group: Any, leaf: int) -> int:
    chunk = group.column(leaf)
    return max(int(chunk.total_compressed_size), int(chunk.total_uncompressed_size))


def _columns(metadata: pq.FileMetaData) -> dict[str, int]:
    """Paths of the columns that can hold images, with their numbers among all leaves."""
    columns = ((metadata.schema.column(number), number) for number in range(metadata.num_columns))
    return {column.path: number for column, number in columns if is_image(column)}


def _in_words(metadata: pq.FileMetaData) -> str:
    leaves = (metadata.schema.column(number) for number in range(metadata.num_columns))
    return ", ".join(f"{leaf.path}: {leaf.physical_type.lower()}" for leaf in leaves) or "no column"


def _label_names(uri: str, metadata: pq.FileMetaData, column: str | None) -> tuple[list[str], bool]:
    """Names of the classes: a column's own values where they are text, else as Hugging Face's `datasets` notes them."""
    schema = metadata.schema.to_arrow_schema()
    if column is None or column not in schema.names:
        return [], False
    kind = schema.field(column).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = pq.read_table(StoredFile(uri), columns=[column])[column]
        return sorted(value for value in values.unique().to_pylist() if value is not None), True
    try:
        info = json.loads((metadata.metadata or {})[b"huggingface"])
        return [str(name) for name in info["info"]["features"][column]["names"]], False
    except (KeyError, TypeError, ValueError):
        return [], False
