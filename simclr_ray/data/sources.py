"""What a source is: tars, Parquet files, loose images, a list of any of them, or a data set that is packed already.

Found out by looking at the names; where those leave it open, the user is asked. A list may name objects anywhere in a
store; web addresses are refused unless the settings of storage allow them, for a list made by others could point at
services inside the cluster's network.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data.listing import SCHEMA, Kind, kind_of, list_folder
from simclr_ray.data.manifest import MANIFEST_NAME, read_manifest
from simclr_ray.data.tar import IMAGE_SUFFIXES
from simclr_ray.errors import ConfigError, DataError

Labels = Literal["none", "folder", "list", "stored"]
SourceKind = Literal["tar", "parquet", "objects", "data_set"]
KINDS: tuple[str, ...] = get_args(Kind)
URI_COLUMNS = ("uri", "url", "path")
"""What the column of addresses of a list may be called."""
LIST_BYTES = 2 << 30
"""Largest list of text, which is read at once; lists in Parquet are read piece by piece."""
_HASHED_AT_ONCE = 64 << 20
_WEB = ("http://", "https://")


class Entries(Protocol):
    """Files by URI, in tables of `listing.SCHEMA`."""

    @property
    def rows(self) -> int:
        """Files."""
        ...

    @property
    def bytes(self) -> int:
        """Their size together; 0 where it is not known."""
        ...

    @property
    def kinds(self) -> Counter[str]:
        """Files by kind, those of no use as `other`."""
        ...

    def tables(self) -> Iterator[pa.Table]:
        """The files, always in the same order."""
        ...


@dataclass(frozen=True)
class Found:
    """A source that was looked at."""

    kind: SourceKind
    entries: Entries
    """All files found, also those of another kind."""

    def tables(self) -> Iterator[pa.Table]:
        """The files of its kind."""
        for table in self.entries.tables():
            if isinstance(self.entries, TextList | ParquetList) and self.kind == "objects":
                yield table  # named one by one, so they need no suffix
            else:
                yield table.filter(
                    pa.array([kind_of(uri) == self.kind for uri in table["uri"].to_pylist()], pa.bool_())
                )


def look(
    source: str, folder: str, *, kind: SourceKind | None, labels: Labels, leave_out: Sequence[str], column: str | None
) -> Found:
    """Find out what a source is.

    Args:
        source: Normalised URI of a folder or a list.
        folder: Working folder for the listing.
        kind: Take only files of this kind; None finds out.
        labels: `list` wants labels in the list.
        leave_out: Folders below the source that are not looked into.
        column: Column of a list that holds the addresses; None looks for `URI_COLUMNS`.

    Raises:
        DataError: the source is absent, holds nothing of use, or is no list.
        ConfigError: it could be several things, or a list holds web addresses.
    """
    entries: Entries
    listed_by = source.rpartition(".")[2].lower()
    if listed_by in ("txt", "csv"):
        entries = _text_list(source, labels, column)
    elif listed_by == "parquet" and (columns := _columns_of_list(source, column)) is not None:
        entries = ParquetList(source, *columns, labels=labels == "list")
    elif storage.exists(storage.join(source, MANIFEST_NAME)) and kind in (None, "data_set"):
        return Found("data_set", TextList(SCHEMA.empty_table()))
    else:
        entries = _folder(source, folder, leave_out)
    return Found(kind or _decide(source, entries), _with_something(source, entries, kind))


def state_of(source: str, kind: SourceKind | None) -> str | None:
    """What a source that is read anew whenever work on it goes on is at present: other for other content.

    Of a data set it is the fingerprint; of a list, or a single shard, the store's version, or for a local file the
    digest of its bytes, above `LIST_BYTES` its size and time of change. None for folders, whose listing is kept for as
    long as the work goes on, and for what is not there.

    Raises:
        DataError: the manifest of a data set cannot be read.
        StorageError: the store fails.
    """
    listed = source.rpartition(".")[2].lower() in ("txt", "csv")
    if listed or kind_of(source) is not None:
        try:
            found = storage.stat(source)
        except FileNotFoundError:
            if listed:
                return None
        else:
            if found.version is not None:
                return f"version {found.version}"
            if found.bytes > LIST_BYTES:
                return f"{found.bytes:,} bytes of {found.modified}"
            return f"digest {_digest(source, found.bytes)}"
    if kind in (None, "data_set") and storage.exists(storage.join(source, MANIFEST_NAME)):
        return f"fingerprint {read_manifest(source).fingerprint}"
    return None


def _digest(uri: str, size: int) -> str:
    """Of a file's bytes, some at a time."""
    hasher = hashlib.blake2b(digest_size=16)
    for start in range(0, size, _HASHED_AT_ONCE):
        hasher.update(storage.read_range(uri, start, min(size, start + _HASHED_AT_ONCE)))
    return hasher.hexdigest()


def _folder(source: str, folder: str, leave_out: Sequence[str]) -> Entries:
    if not storage.exists(source):
        raise DataError("no such folder", where=source, fix="give a folder, or a .txt, .csv or .parquet list")
    if kind_of(source) is not None:
        try:
            found = storage.stat(source)  # one file, such as a single tar
        except FileNotFoundError:
            return list_folder(source, folder, leave_out=leave_out)
        row = {"uri": [source], "bytes": [found.bytes], "version": [found.version], "label": [None]}
        return TextList(pa.table(row, schema=SCHEMA))
    return list_folder(source, folder, leave_out=leave_out)


def _with_something(source: str, entries: Entries, kind: SourceKind | None) -> Entries:
    wanted = [kind] if kind else list(KINDS)
    if isinstance(entries, TextList | ParquetList) and kind == "objects":
        wanted = list(entries.kinds)
    if not any(entries.kinds[one] for one in wanted):
        found = ", ".join(f"{count:,} {one}" for one, count in sorted(entries.kinds.items())) or "no file at all"
        images = ", ".join(sorted(IMAGE_SUFFIXES))
        what = "no images found" if kind is None else f"no files of the kind {kind} found"
        raise DataError(what, where=source, got=found, expected=f"files ending in tar, parquet, {images}")
    return entries


def _decide(source: str, entries: Entries) -> SourceKind:
    """The kind of a source that no one named.

    Raises:
        ConfigError: there are files of several kinds.
    """
    kinds = entries.kinds
    if isinstance(entries, TextList | ParquetList):
        shards: tuple[SourceKind, ...] = ("tar", "parquet")
        return next((kind for kind in shards if kinds[kind] == entries.rows), "objects")
    present: list[SourceKind] = [kind for kind in get_args(Kind) if kinds[kind]]
    if present == ["tar", "parquet"] and _all_beside_tars(entries):
        return "tar"
    if len(present) > 1:
        raise ConfigError(
            "the folder holds files of several kinds", where=source,
            got=", ".join(f"{kinds[kind]:,} {kind}" for kind in present),
            fix="say which to take: " + " or ".join(f"--kind {kind}" for kind in present),
        )  # fmt: skip
    return present[0] if present else "objects"


def _all_beside_tars(entries: Entries) -> bool:
    """Whether each Parquet file only describes the tar of the same name, as img2dataset writes them."""
    tars: set[str] = set()
    tables: set[str] = set()
    for table in entries.tables():
        for uri in table["uri"].to_pylist():
            kind = kind_of(uri)
            if kind in ("tar", "parquet"):
                (tars if kind == "tar" else tables).add(uri[: -len(kind)])
    return tables <= tars


@dataclass(frozen=True)
class TextList:
    """Files named by a list in memory."""

    table: pa.Table

    @property
    def rows(self) -> int:
        """Lines."""
        return int(self.table.num_rows)

    @property
    def bytes(self) -> int:
        """Not known, unless the list came from a store."""
        return pc.sum(self.table["bytes"]).as_py() or 0

    @cached_property
    def kinds(self) -> Counter[str]:
        """By suffix."""
        return Counter(kind_of(uri) or "other" for uri in self.table["uri"].to_pylist())

    def tables(self) -> Iterator[pa.Table]:
        """One table."""
        yield self.table


@dataclass(frozen=True)
class ParquetList:
    """Files named by a column of a Parquet file, such as a store's inventory; read by row groups."""

    uri: str
    column: str
    label_column: str | None
    labels: bool

    @cached_property
    def rows(self) -> int:
        """Lines."""
        return int(self._open().metadata.num_rows)

    @property
    def bytes(self) -> int:
        """Not known."""
        return 0

    @cached_property
    def kinds(self) -> Counter[str]:
        """By suffix; found by reading the whole list, once."""
        return sum((TextList(table).kinds for table in self.tables()), Counter())

    def tables(self) -> Iterator[pa.Table]:
        """A table for each row group, in its order."""
        if self.labels and self.label_column is None:
            raise DataError("the list has no labels", where=self.uri, expected='a column "label"')
        file = self._open()
        columns = [self.column, *([self.label_column] if self.labels and self.label_column else [])]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns)
            uris = [None if uri is None else str(uri) for uri in rows[self.column].to_pylist()]
            labels = rows[columns[-1]].cast(pa.string()).to_pylist() if self.labels else [None] * len(uris)
            kept = [(uri, label) for uri, label in zip(uris, labels, strict=True) if uri and uri.strip()]
            yield _listed(self.uri, kept)

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(StoredFile(self.uri), pre_buffer=False)


def _columns_of_list(source: str, column: str | None) -> tuple[str, str | None] | None:
    """Columns of addresses and labels, if a Parquet file is a list; None if it holds images itself or is a folder."""
    try:
        storage.stat(source)
    except FileNotFoundError:
        return None
    try:
        schema = pq.read_schema(StoredFile(source))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file: {error}", where=source) from None
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    found = [name for name in texts if (name == column if column else name.lower() in URI_COLUMNS)]
    label = next((field.name for field in schema if field.name.lower() == "label"), None)
    binary = any(_holds_bytes(field.type) for field in schema)
    return (found[0], label) if found and not binary else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _text_list(source: str, labels: Labels, column: str | None) -> TextList:
    try:
        size = storage.stat(source).bytes
        if size > LIST_BYTES:
            raise DataError(
                "the list is too long to be read at once", where=source, got=f"{size:,} bytes",
                expected=f"at most {LIST_BYTES:,}", fix="give it as .parquet with a column uri",
            )  # fmt: skip
        text = storage.read_bytes(source).decode("utf-8-sig")  # spreadsheets begin their exports with a mark
    except FileNotFoundError:
        raise DataError("no such list", where=source) from None
    except UnicodeDecodeError as error:
        raise DataError(f"the list is not UTF-8 text: {error}", where=source) from None
    if source.lower().endswith(".txt") and labels != "list":
        lines = [[line.strip(), None] for line in text.splitlines() if line.strip()]
    else:
        lines = _csv_lines(source, text, labels, column)
    return TextList(_listed(source, lines).sort_by("uri"))


def _csv_lines(source: str, text: str, labels: Labels, column: str | None) -> list[list[str | None]]:
    reader = csv.reader(io.StringIO(text))
    lines: list[list[str | None]] = []
    at, label_at = 0, 1
    try:
        for number, line in enumerate(reader):
            names = [name.strip().lower() for name in line]
            wanted = [column.lower()] if column else list(URI_COLUMNS)
            if number == 0 and (header := [name for name in wanted if name in names]):
                at = names.index(header[0])
                label_at = names.index("label") if "label" in names else 1
                continue
            if len(line) <= at or not line[at].strip():
                continue
            if labels == "list" and len(line) <= label_at:
                raise DataError("line has no label", where=f"{source}:{reader.line_num}", expected="URI,label")
            lines.append([line[at].strip(), line[label_at].strip() if labels == "list" else None])
    except csv.Error as error:
        raise DataError(f"not a list of images: {error}", where=f"{source}:{reader.line_num}") from None
    return lines


def _listed(source: str, lines: Sequence[Sequence[str | None]]) -> pa.Table:
    """Lines of a list as entries; an address that is relative starts at the list's folder."""
    home = source.rpartition("/")[0]
    uris = [storage.join(home, str(uri)) for uri, _ in lines]
    local = next((uri for uri in uris if not storage.may_name(source, uri)), None)
    if local is not None:
        raise ConfigError(
            "a list in a store may not name files of the machines that read it", where=source, got=local[:200],
            fix="name objects of a store, or copy the list to this machine if you trust every line of it",
        )  # fmt: skip
    web = next((uri for uri in uris if uri.lower().startswith(_WEB)), None)
    if web is not None and not storage.current().allow_http:
        raise ConfigError(
            "the list holds web addresses, which are not read: they could point into the cluster's own network",
            where=source, got=storage.redact(storage.tellable(web))[:200],
            fix="copy the images to a store, or set storage.allow_http=true if you trust every line of the list",
        )  # fmt: skip
    columns = {
        "uri": uris, "bytes": pa.nulls(len(uris), pa.int64()), "version": pa.nulls(len(uris), pa.string()),
        "label": [label for _, label in lines],
    }  # fmt: skip
    return pa.table(columns, schema=SCHEMA)


class StoredFile(io.RawIOBase):
    """A stored file for Arrow, read by ranges."""

    def __init__(self, uri: str) -> None:
        self._uri, self._at, self._size = uri, 0, storage.stat(uri).bytes

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Position."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move; nothing is read."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """One range read."""
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        data = storage.read_range(self._uri, min(self._at, stop), stop)
        self._at = stop
        return data
