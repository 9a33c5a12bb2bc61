"""Byte ranges of shards: read whole or in parallel parts, and what it means when a shard is not as it was.

Three things can be wrong, and each has its own consequence. The shard is gone or damaged (`LostShard`): the samples in
it are lost, the run goes on. It is whole, but another one than the manifest describes (`DataError`): going on would
train on other samples than planned, so the run stops. The store does not answer (`StorageError`): nothing is wrong
with the data, the run stops and can be continued.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple

from simclr_ray import storage
from simclr_ray.data.decode import Reason
from simclr_ray.errors import DataError
from simclr_ray.storage.uris import S3_SCHEMES, scheme_of

GROUP_BYTES = 512 << 20
"""Most bytes of one group, stored or decompressed. A unit is at least one group, and some units are in memory at a
time; a shard with larger groups must be packed again."""
IN_PARTS_ABOVE, PART_BYTES = 16 << 20, 8 << 20
"""One S3 connection gives some 80 MB/s, so large ranges are read by several; small ones would only cost requests."""
_PART_READERS = 8
IMAGE = "image"
"""Kind of a `Source` that is a loose image: nothing at its end tells whether it is whole."""


class LostShard(DataError):
    """A shard, or a group of it, that cannot be read and never will be."""

    reason: ClassVar[Reason]


class MissingShard(LostShard):
    """It is not there any more."""

    reason = "shard_missing"


class UnreadableShard(LostShard):
    """It is there, but cut off, damaged or too large."""

    reason = "shard_unreadable"


class Source(NamedTuple):
    """A shard as the manifest knows it, or a loose image as a shard lists it."""

    uri: str
    kind: str
    bytes: int
    version: str | None
    ours: bool = True
    """See `Manifest.ours`; goes for what a list of loose images names."""


def verify(source: Source) -> tuple[object, ...]:
    """Check that the shard is the one of the manifest where reading it would not tell, and name its state.

    S3 compares versions with each read. For everything else, and for copies, whose versions are their own, the size
    is looked up first.

    Returns:
        A key for caches, other for every state of the shard that can be told apart.

    Raises:
        LostShard: it is gone or cut off.
        DataError: it is another one.
        StorageError: the store fails.
    """
    if source.version is not None and scheme_of(source.uri) in S3_SCHEMES:
        return (source.uri, source.version)
    try:
        found = storage.stat(source.uri)
    except FileNotFoundError:
        raise _gone(source.uri) from None
    if None not in (source.version, found.version) and source.version != found.version:
        raise changed(source.uri, got=f"version {found.version}", expected=f"version {source.version}")
    if found.bytes != source.bytes:
        raise _of_another_size(source, found.bytes)
    return (source.uri, found.version, found.modified, found.bytes)


def read(source: Source, start: int, stop: int) -> bytes:
    """Bytes start to stop of a shard, in parallel parts if they are many.

    Raises:
        LostShard: it is gone, or ends before.
        DataError: it has another version.
        StorageError: the store fails.
    """
    if stop - start <= IN_PARTS_ABOVE:
        return _read(source, (start, stop))
    data = bytearray(stop - start)
    ranges = parts(start, stop)
    for (begin, end), part in zip(ranges, _pool().map(lambda one: _read(source, one), ranges), strict=True):
        data[begin - start : end - start] = part
    return bytes(data)


def parts(start: int, stop: int) -> list[tuple[int, int]]:
    """A range cut into parts of nearly the same size, about `PART_BYTES` each."""
    count = -(-(stop - start) // PART_BYTES)
    ends = [start + (stop - start) * number // count for number in range(count + 1)] if count else []
    return list(pairwise(ends))


def changed(uri: str, *, got: str, expected: str) -> DataError:
    """The error for a shard that is another one than the manifest describes."""
    return DataError(
        "shard changed since the manifest was written", where=storage.tellable(uri), got=got, expected=expected,
        fix="restore it, or pack or index the images again and start a new run",
    )  # fmt: skip


def unreadable(uri: str, why: object) -> UnreadableShard:
    """The error for a shard that is the manifest's, but damaged."""
    told = storage.tellable(uri)
    return UnreadableShard(f"shard cannot be read: {why}", where=told, fix="restore it from its source")


def too_large(uri: str, group: int, size: int) -> UnreadableShard:
    """The error for a group above the limit."""
    return UnreadableShard(
        f"group {group} of the shard is too large", where=storage.tellable(uri), got=f"{size:,} bytes",
        expected=f"at most {GROUP_BYTES:,}", fix="pack the images again, which makes small groups",
    )  # fmt: skip


def _read(source: Source, part: tuple[int, int]) -> bytes:
    try:
        return storage.read_range(source.uri, *part, version=source.version)
    except FileNotFoundError:
        raise _gone(source.uri) from None
    except storage.ChangedError:
        raise changed(source.uri, got="another version", expected=f"version {source.version}") from None
    except storage.OutOfRangeError as error:
        raise unreadable(source.uri, f"it is cut off, {error.got} of {source.bytes:,} are left") from None


def _gone(uri: str) -> MissingShard:
    return MissingShard(
        "shard is gone, but was in the manifest", where=storage.tellable(uri),
        fix="restore it, or pack the images again",
    )  # fmt: skip


def _of_another_size(source: Source, size: int) -> DataError:
    """A shard that was cut off is lost. One that is whole, with an end as its kind has one, was rewritten."""
    whole = size > source.bytes
    if not whole and source.kind in ("parquet", "objects", "tar"):
        end = _read(source._replace(version=None), (max(0, size - 1024), size))
        whole = end.count(0) == 1024 if source.kind == "tar" else end.endswith(b"PAR1")
    if whole or source.kind == IMAGE:
        return changed(source.uri, got=f"{size:,} bytes", expected=f"{source.bytes:,}")
    return unreadable(source.uri, f"it is cut off, {size:,} bytes of {source.bytes:,} are left")


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Threads of this process for parts alone: who waits for parts is never among them."""
    return ThreadPoolExecutor(_PART_READERS, thread_name_prefix="part")
