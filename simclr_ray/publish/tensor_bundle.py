"""Read TensorFlow's checkpoints (`NAME.index` and `NAME.data-00000-of-00001`) without TensorFlow.

The index is a sorted table in LevelDB's format (tensorflow/core/lib/io/format.h): blocks of entries whose keys share
prefixes, and a footer of 48 bytes that names the block of blocks. Its values are `BundleEntryProto` messages
(tensorflow/core/protobuf/tensor_bundle.proto), which say where a tensor's bytes lie in which data file. Nothing in it
is code. Every number is held to the file's size before it is used; the checksums of tensors are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from simclr_ray import storage
from simclr_ray.errors import DataError

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_TRAILER = 5
"""After each block: its compression, 0 for none, and a checksum."""
_FLOATS: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 19: np.dtype("<f2")}
"""Tensors that weights are made of, by DataType; others are passed over."""


class Broken(ValueError):
    """Bytes that are no such file."""


class Entry(NamedTuple):
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


@dataclass(frozen=True)
class Bundle:
    """A checkpoint, opened: tensors are read when they are asked for."""

    prefix: str
    shards: int
    entries: Mapping[str, Entry]

    def names(self) -> list[str]:
        """Of the floating-point tensors, sorted."""
        return sorted(name for name, entry in self.entries.items() if entry.dtype in _FLOATS)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor.

        Raises:
            DataError: its data is missing or of another size than its shape.
        """
        entry = self.entries[name]
        dtype = _FLOATS[entry.dtype]
        uri = f"{self.prefix}.data-{entry.shard:05d}-of-{self.shards:05d}"
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise DataError(f"tensor {name!a} has {entry.size} bytes for shape {entry.shape}", where=uri)
        try:
            data = storage.read_range(uri, entry.offset, entry.offset + entry.size)
        except (FileNotFoundError, storage.OutOfRangeError) as error:
            raise DataError(f"the data of tensor {name!a} is missing: {error}", where=uri) from None
        return np.frombuffer(data, dtype).reshape(entry.shape).astype(np.float32)


def open_bundle(index_uri: str) -> Bundle:
    """Open a checkpoint by its `.index` file.

    Raises:
        DataError: it is missing, or no such file.
    """
    try:
        data = storage.read_bytes(index_uri)
    except FileNotFoundError:
        raise DataError("no checkpoint here", where=index_uri) from None
    try:
        table = dict(_table(data))
        shards = _fields(table.pop(b"", b"")).get(1, [1])[0]
        entries = {name.decode(): _entry(value) for name, value in table.items()}
    except (Broken, IndexError, UnicodeDecodeError, TypeError) as error:
        raise DataError(f"not the index of a TensorFlow checkpoint: {error}", where=index_uri) from None
    assert isinstance(shards, int)
    return Bundle(index_uri.removesuffix(".index"), shards, entries)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    footer = data[-_FOOTER:]
    if len(footer) < _FOOTER or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise Broken("its last bytes are not a table's")
    _, at = _handle(footer, 0)
    (offset, size), _ = _handle(footer, at)
    for _, value in _block(data, offset, size):
        (offset, size), _ = _handle(value, 0)
        yield from _block(data, offset, size)


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    if offset + size + _TRAILER > len(data) or size < 4:
        raise Broken(f"a block of {size} bytes at {offset} is not inside of it")
    if data[offset + size]:
        raise Broken("its blocks are compressed")
    block = data[offset : offset + size]
    restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 - 4 * restarts
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise Broken("an entry is longer than its block")
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + length]
        at += length


def _entry(value: bytes) -> Entry:
    fields = _fields(value)

    def number(field: int) -> int:
        found = fields.get(field, [0])[0]
        if not isinstance(found, int):
            raise Broken("a number is none")
        return found

    shape = list[int]()
    for message in fields.get(2, []):
        for dimension in _fields(message if isinstance(message, bytes) else b"").get(2, []):
            size = _fields(dimension if isinstance(dimension, bytes) else b"").get(1, [0])[0]
            assert isinstance(size, int)
            shape.append(size)
    return Entry(number(1), tuple(shape), number(3), number(4), number(5))


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protocol buffer by number: varints as numbers, the rest as bytes."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 5):
            value, at = message[at : at + (8 if kind == 1 else 4)], at + (8 if kind == 1 else 4)
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise Broken(f"a field of kind {kind}")
        if at > len(message):
            raise Broken("a field is longer than its message")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Broken("a number of more than 64 bits")
