"""Shards in columns, as a manifest holds them.

10^9 images are 15.6 million row groups, of which Python objects would take gigabytes. Here they are a few arrays, and a
`Shard` is made when one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Kind = Literal["parquet", "tar", "objects"]
"""How a shard is read.

`parquet`: a column of encoded images; a group is a row group. `tar`: a WebDataset; a group is a run of consecutive
samples. `objects`: a Parquet list `uri, bytes, version` of loose images; a group is a row group of the list.
"""
KINDS: tuple[str, ...] = get_args(Kind)

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("version", pa.string()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("rows_per_group", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("offsets", pa.list_(pa.field("element", pa.int64(), nullable=False)), nullable=False),
    ]
)

_TEXTS = ("uri", "kind", "digest", "version")
_LISTS = ("rows_per_group", "offsets")

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """One stored file of rows."""

    uri: str
    """Path relative to the manifest's folder, or a full URI."""
    kind: str
    """How it is read, one of `KINDS`."""
    digest: str
    """Of its content where we wrote it, the store's version where it was indexed in place; part of the fingerprint."""
    bytes: int
    rows_per_group: tuple[int, ...]
    """Rows of each group."""
    offsets: tuple[int, ...] = ()
    """`parquet`, `objects`: where the footer starts, or nothing when that is not known. `tar`: where each group starts,
    and where the last one ends."""
    version: str | None = None
    """The store's version (ETag). Reading asks for it, so that a rewritten shard is an error and not other samples."""

    def __post_init__(self) -> None:
        """Take any sequence of numbers."""
        for name in _LISTS:
            object.__setattr__(self, name, tuple(int(number) for number in getattr(self, name)))

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(self.rows_per_group)


class ShardTable(Sequence[Shard]):
    """Shards in columns; `table[i]` makes one of them."""

    def __init__(
        self, texts: Mapping[str, pa.StringArray], sizes: Int64s, rows: tuple[Int32s, Int64s],
        offsets: tuple[Int64s, Int64s],
    ) -> None:  # fmt: skip
        """Take the columns; lists as all their values, and (S + 1,) bounds of each shard's."""
        self._texts = texts
        self.bytes = sizes
        """Size of each shard, (S,)."""
        self.rows_per_group, self.group_bounds = rows
        """Rows of every group of all shards, int32 (G,); those of shard s are at [bounds[s], bounds[s + 1])."""
        self.offsets, self.offset_bounds = offsets
        """Offsets of all shards, int64, with bounds of their own."""

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> ShardTable:
        """Columns of some shards."""
        if isinstance(shards, ShardTable):
            return shards
        shards = list(shards)
        return cls.from_arrow(
            pa.table({name: [getattr(s, name) for s in shards] for name in SCHEMA.names}, schema=SCHEMA)
        )

    @classmethod
    def from_arrow(cls, table: pa.Table) -> ShardTable:
        """Columns of a table of the manifest's schema; numbers are not copied where a column is in one piece."""
        columns = {name: _one_chunk(table.column(name)) for name in SCHEMA.names}
        texts = {name: columns[name] for name in _TEXTS}
        return cls(texts, columns["bytes"].to_numpy(), _flat(columns["rows_per_group"]), _flat(columns["offsets"]))

    @classmethod
    def gather(cls, parts: Iterable[ShardTable], *, groups: int, offsets: int) -> ShardTable:
        """One table of several, which are copied one after another into memory that is taken once.

        Args:
            parts: Tables.
            groups: Groups of all of them, or more.
            offsets: Offsets of all of them, or more.
        """
        rows, places = _Lists(np.empty(groups, np.int32)), _Lists(np.empty(offsets, np.int64))
        texts: dict[str, list[pa.StringArray]] = {name: [] for name in _TEXTS}
        sizes = [np.zeros(0, np.int64)]
        for part in parts:
            for name in _TEXTS:
                texts[name].append(part._texts[name])
            sizes.append(part.bytes)
            rows.append(part.rows_per_group, part.group_bounds)
            places.append(part.offsets, part.offset_bounds)
        joined = {name: pa.chunked_array(found, pa.string()).combine_chunks() for name, found in texts.items()}
        return cls(joined, np.concatenate(sizes), rows.joined(), places.joined())

    def as_arrow(self) -> pa.Table:
        """The table as it is stored; numbers are not copied."""
        lists = {
            "rows_per_group": (self.rows_per_group, self.group_bounds),
            "offsets": (self.offsets, self.offset_bounds),
        }
        arrays = {
            name: pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), pa.array(flat), SCHEMA.field(name).type)
            for name, (flat, bounds) in lists.items()
        }
        columns = {**self._texts, "bytes": pa.array(self.bytes), **arrays}
        return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)

    def __len__(self) -> int:
        return len(self.bytes)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, index: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        groups, offsets = self.groups_of(index), self.offsets_of(index)
        return Shard(
            self.text("uri", index), self.text("kind", index), self.text("digest", index), int(self.bytes[index]),
            tuple(groups.tolist()), tuple(offsets.tolist()), self.version(index),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self.as_arrow().equals(other.as_arrow())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ShardTable of {len(self)} shards"

    def text(self, name: str, index: int) -> str:
        """`uri`, `kind` or `digest` of a shard, without making the whole `Shard`."""
        return str(self._texts[name][index].as_py())

    def version(self, index: int) -> str | None:
        """The store's version of a shard, if it was known."""
        value: str | None = self._texts["version"][index].as_py()
        return value

    def groups_of(self, index: int) -> Int32s:
        """Rows of each group of a shard."""
        return self.rows_per_group[self.group_bounds[index] : self.group_bounds[index + 1]]

    def offsets_of(self, index: int) -> Int64s:
        """Offsets of a shard."""
        return self.offsets[self.offset_bounds[index] : self.offset_bounds[index + 1]]

    @cached_property
    def first_rows(self) -> Int64s:
        """Number of the first row of each shard, and the number of all rows at the end: (S + 1,)."""
        return np.concatenate([[0], np.cumsum(self.sums_by_shard(lambda rows: rows))])

    def sums_by_shard(self, function: Any) -> Int64s:
        """Sum over the groups of each shard of `function(rows)`, (S,); shards in runs, to keep temporaries small."""
        bounds = self.group_bounds
        out = np.empty(len(self), dtype=np.int64)
        for start in range(0, len(self), 4096):
            ends = bounds[start : start + 4097]
            values = function(self.rows_per_group[ends[0] : ends[-1]].astype(np.int64))
            sums = np.concatenate([[0], np.cumsum(values)])
            out[start : start + 4096] = np.diff(sums[ends - ends[0]])
        return out

    def update(self, hasher: Any) -> None:
        """Feed all that decides the samples to a hash: each column's bytes, little-endian, its length first."""
        for name in ("uri", "kind", "digest"):
            data, ends = _text_buffers(self._texts[name])
            _feed(hasher, ends)
            _feed(hasher, data)
        _feed(hasher, self.bytes)
        for flat, bounds in ((self.rows_per_group, self.group_bounds), (self.offsets, self.offset_bounds)):
            _feed(hasher, bounds)
            _feed(hasher, flat)


class _Lists:
    """The values of many lists, gathered into memory that is taken once."""

    def __init__(self, memory: npt.NDArray[Any]) -> None:
        self._memory, self._filled = memory, 0
        self._bounds = [np.zeros(1, np.int64)]

    def append(self, values: npt.NDArray[Any], bounds: Int64s) -> None:
        if values.dtype != self._memory.dtype:
            raise TypeError(f"a list of {values.dtype}")
        self._memory[self._filled : self._filled + len(values)] = values
        self._bounds.append(bounds[1:] + self._filled)
        self._filled += len(values)

    def joined(self) -> tuple[npt.NDArray[Any], Int64s]:
        return self._memory[: self._filled], np.concatenate(self._bounds)


def _one_chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column as one array; not copied where it is one already."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _flat(lists: pa.ListArray) -> tuple[npt.NDArray[Any], Int64s]:
    """Values of all lists, and where each list starts and ends, int64 (n + 1,)."""
    bounds = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.slice(bounds[0], bounds[-1] - bounds[0])
    if values.null_count:
        raise ValueError("a list holds nulls")
    return values.to_numpy(), bounds - bounds[0]


def _text_buffers(texts: pa.StringArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """UTF-8 bytes of all strings, and where each starts and ends in them."""
    _, ends, data = texts.buffers()
    flat = np.frombuffer(data, dtype=np.uint8) if data else np.zeros(0, np.uint8)
    bounds = np.zeros(1, np.int64)
    if ends:
        bounds = np.frombuffer(ends, np.int32, count=len(texts) + 1, offset=4 * texts.offset).astype(np.int64)
    return flat[bounds[0] : bounds[-1]], bounds - bounds[0]


def _feed(hasher: Any, array: npt.NDArray[Any]) -> None:
    """The array's bytes, whatever the machine's byte order, after their number."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    hasher.update(little.nbytes.to_bytes(8, "little"))
    hasher.update(little.data)
