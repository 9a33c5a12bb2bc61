"""Rows of Parquet row groups by range reads: the footer once, then the column chunks that are wanted.

The reader is Arrow's; it is given a file of which only those ranges are in memory. Pages that have a checksum, as those
of canonical shards do, are held to it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simclr_ray.data import ranges
from simclr_ray.data.footer import SEAL_BYTES, is_damaged
from simclr_ray.data.ranges import Source
from simclr_ray.errors import DataError

FOOTERS_BYTES = 64 << 20
"""Memory of a process for parsed footers."""
_PARSED = 8
"""Bytes of memory that a stored byte of a footer takes when it is parsed, about."""
_TAIL_BYTES = 64 << 10
"""What is read of a shard whose footer's place is not known; most footers are smaller."""
_END = b"PAR1"


def read_group(
    source: Source, group: int, rows: int, columns: Sequence[str], *, footer: int | None, images: str | None = None
) -> pa.Table:
    """Some columns of one row group.

    Args:
        source: The shard.
        group: Number of the row group.
        rows: Rows it has, as the manifest knows.
        columns: Names; `image.bytes` is field `bytes` of struct `image`.
        footer: Where the footer starts, if it is known.
        images: The column that must hold encoded images, if it is among them.

    Raises:
        LostShard: the shard is gone or damaged, or the group is too large.
        DataError: it is another shard than the manifest's, or a column is missing or of another type.
        StorageError: the store fails.
    """
    metadata = _FOOTERS.get(ranges.verify(source), lambda: _read_footer(source, footer))
    leaves = find_columns(metadata, columns, source.uri, images=images)
    found = metadata.row_group(group).num_rows if group < metadata.num_row_groups else None
    if found != rows:
        raise DataError(
            f"row group {group} changed since the manifest was written", where=source.uri,
            got="no such group" if found is None else f"{found} rows", expected=f"{rows}",
            fix="pack or index the images again and start a new run",
        )  # fmt: skip
    chunks = [metadata.row_group(group).column(leaf) for leaf in leaves]
    size = max(sum(c.total_compressed_size for c in chunks), sum(c.total_uncompressed_size for c in chunks))
    if size > ranges.GROUP_BYTES:
        raise ranges.too_large(source.uri, group, size)
    file = _RangeFile(source)
    for start, stop in _merged([_range_of(chunk) for chunk in chunks]):
        file.add(start, ranges.read(source, start, stop))
    try:
        with pa.PythonFile(file, mode="r") as opened:
            parquet = pq.ParquetFile(opened, metadata=metadata, pre_buffer=False, page_checksum_verification=True)
            table = parquet.read_row_group(group, columns=list(columns), use_threads=False)
        table = pa.table([_column(table, name) for name in columns], names=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise ranges.unreadable(source.uri, error) from None
    if len(table) != rows:  # the header of a page, which its checksum does not cover
        raise ranges.unreadable(source.uri, f"row group {group} holds {len(table)} rows where {rows} are announced")
    return table


def is_image(column: pq.ColumnSchema) -> bool:
    """Whether a leaf of a Parquet schema can hold one encoded image a row."""
    plain = column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
    return bool(plain and column.max_repetition_level == 0)


def _read_footer(source: Source, start: int | None) -> pq.FileMetaData:
    if start is None:
        tail = ranges.read(source, max(0, source.bytes - _TAIL_BYTES), source.bytes)
        start = source.bytes - 8 - int.from_bytes(tail[-8:-4], "little")
        if 0 <= start < source.bytes - len(tail):
            tail = ranges.read(source, max(0, start - SEAL_BYTES), source.bytes)
    else:
        tail = ranges.read(source, max(0, start - SEAL_BYTES), source.bytes)
    at = max(0, len(tail) - (source.bytes - start))
    if is_damaged(tail[max(0, at - SEAL_BYTES) : at], tail[at:]):
        raise ranges.unreadable(source.uri, "its footer does not fit its checksum")
    if not tail.endswith(_END):
        raise ranges.unreadable(source.uri, "it does not end as a Parquet file does")
    try:
        # As a file of its own, for of the real one Arrow would read the last 64 KiB once more.
        return pq.read_metadata(pa.BufferReader(_END + tail))
    except (pa.ArrowException, OSError) as error:
        raise ranges.unreadable(source.uri, error) from None


def find_columns(
    metadata: pq.FileMetaData, columns: Sequence[str], uri: str, *, images: str | None = None
) -> list[int]:
    """Numbers of the columns in the file's flat schema.

    Raises:
        DataError: a column is not there, or `images` is of another type; the columns found are named.
    """
    schema = metadata.schema
    leaves = {schema.column(number).path: number for number in range(metadata.num_columns)}
    for name in columns:
        fix = "name the column of images when the data set is packed or indexed" if name == images else None
        if name not in leaves:
            nested = [path for path in leaves if "." in path]
            found = list(dict.fromkeys(path.partition(".")[0] for path in leaves))
            raise DataError(f'no column "{name}"', where=uri, got=", ".join(found + nested), fix=fix)
        if name == images and not is_image(schema.column(leaves[name])):
            types = ", ".join(f"{path}: {_type_of(schema.column(leaf))}" for path, leaf in leaves.items())
            expected = "binary values, one a row"
            raise DataError(
                f'column "{name}" does not hold encoded images', where=uri, got=types, expected=expected, fix=fix
            )
    return [leaves[name] for name in columns]


def _type_of(column: pq.ColumnSchema) -> str:
    logical = column.logical_type.type
    text = str(column.physical_type if logical == "NONE" else logical).lower()
    return f"list of {text}" if column.max_repetition_level else text


def _range_of(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    dictionary, data = chunk.dictionary_page_offset, chunk.data_page_offset
    start = min(dictionary, data) if dictionary else data
    return start, start + chunk.total_compressed_size


def _merged(wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges as one, in order."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(wanted):
        if out and start == out[-1][1]:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column by name or path."""
    if name in table.column_names:
        return table.column(name)
    top, *path = name.split(".")
    return pc.struct_field(table.column(top), path)


class _RangeFile:
    """A file for Arrow of which some ranges are in memory; what else it asks for is read then."""

    closed = False

    def __init__(self, source: Source) -> None:
        self._source, self._at = source, 0
        self._ranges: list[tuple[int, memoryview]] = []

    def add(self, start: int, data: bytes) -> None:
        self._ranges.append((start, memoryview(data)))

    def read(self, size: int = -1) -> memoryview | bytes:
        start, stop = self._at, self._source.bytes
        if size >= 0:
            stop = min(stop, start + size)
        self._at = max(start, stop)
        for begin, data in self._ranges:
            if begin <= start and stop <= begin + len(data):
                return data[start - begin : stop - begin]
        return ranges.read(self._source, start, max(start, stop))

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._source.bytes)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing is open."""


class _Footers:
    """The footers used last, within `FOOTERS_BYTES`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, pq.FileMetaData] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: object, read: Callable[[], pq.FileMetaData]) -> pq.FileMetaData:
        """The footer under this key. Two threads may read the same one at once, which costs a request and no more."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        footer = read()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = footer
                self._bytes += _PARSED * footer.serialized_size
            while self._bytes > FOOTERS_BYTES and len(self._kept) > 1:
                self._bytes -= _PARSED * self._kept.popitem(last=False)[1].serialized_size
        return footer


_FOOTERS = _Footers()
