"""What the backends return and raise, and the interface they share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from simclr_ray.errors import StorageError
from simclr_ray.storage.uris import tellable


@dataclass(frozen=True)
class Stat:
    """What a store says about an object."""

    bytes: int
    version: str | None
    """The store's ETag without quotes; None where it has none (local files)."""
    modified: float
    """Seconds since 1970, by the store's clock; 0.0 where it does not say."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing."""

    uri: str
    bytes: int
    version: str | None


class ChangedError(StorageError):
    """The object is there, but in another version than the one asked for."""


class OutOfRangeError(StorageError):
    """The object ends before the range that was asked for: it is shorter than its reader was told."""


class Store(Protocol):
    """A backend. URIs are normalised; `FileNotFoundError` means absent, all else is a `StorageError`."""

    swaps: ClassVar[bool]
    """Whether `replace` is there, and compares and swaps in one step."""

    def describe(self, uri: str) -> str: ...  # noqa: D102
    def read(self, uri: str) -> tuple[bytes, str | None]: ...  # noqa: D102
    def read_range(self, uri: str, start: int, stop: int, version: str | None) -> bytes: ...  # noqa: D102
    def stat(self, uri: str) -> Stat: ...  # noqa: D102
    def write(self, uri: str, data: bytes) -> str | None: ...  # noqa: D102
    def create(self, uri: str, data: bytes) -> bool: ...  # noqa: D102
    def replace(self, uri: str, data: bytes, version: str) -> str | None: ...  # noqa: D102
    def scan(self, uri: str) -> Iterator[list[Entry]]: ...  # noqa: D102
    def level(self, uri: str) -> tuple[list[str], list[Entry]]: ...  # noqa: D102
    def exists(self, uri: str) -> bool: ...  # noqa: D102
    def delete_file(self, uri: str) -> None: ...  # noqa: D102
    def delete_folder(self, uri: str) -> None: ...  # noqa: D102


def digest(data: bytes) -> str:
    """Content digest: 128-bit BLAKE2b as 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def replaced(uri: str) -> ChangedError:
    """The sentence for an object that is there in another version than its reader holds."""
    return ChangedError(
        "the object was replaced since its version was noted", where=tellable(uri),
        fix="restore it, or index the data set again and start a new run",
    )  # fmt: skip


def ends_early(uri: str, start: int, stop: int, size: int) -> OutOfRangeError:
    """The sentence for a range that reaches past the object's end."""
    return OutOfRangeError(
        "the object is shorter than its reader was told", where=tellable(uri), got=f"{size:,} bytes",
        expected=f"bytes {start:,} to {stop:,}", fix="it was cut or replaced: restore it, or index the data set again",
    )  # fmt: skip
