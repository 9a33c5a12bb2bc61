"""One door to local folders and object stores: a URI in, bytes out.

Local paths, `s3://` through botocore, and other schemes through fsspec. No credential is held here, written or sent
anywhere: each process resolves the usual chain by itself. Writes appear whole or not at all. What may pass is tried
again by one layer (`retry`); what does not pass is a `StorageError` that says what was asked of whom, without a key
in it. `FileNotFoundError` means that the object is absent, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

from simclr_ray.storage.counting import METER, Counters
from simclr_ray.storage.kinds import ChangedError, Entry, OutOfRangeError, Stat, Store, digest
from simclr_ray.storage.local import LocalStore
from simclr_ray.storage.other import OtherStore
from simclr_ray.storage.redaction import redact
from simclr_ray.storage.s3 import S3Store
from simclr_ray.storage.settings import StorageSettings, configure, current, environment
from simclr_ray.storage.uris import S3_SCHEMES, is_local, join, join_named, may_name, normalise, scheme_of, tellable

__all__ = [
    "ChangedError",
    "Counters",
    "Entry",
    "OutOfRangeError",
    "Stat",
    "StorageSettings",
    "can_swap",
    "configure",
    "counters",
    "create_bytes",
    "current",
    "delete_file",
    "delete_folder",
    "describe",
    "digest",
    "environment",
    "exists",
    "is_local",
    "join",
    "join_named",
    "list_files",
    "list_level",
    "list_names",
    "may_name",
    "normalise",
    "read_bytes",
    "read_range",
    "read_versioned",
    "redact",
    "replace_bytes",
    "scan",
    "stat",
    "tellable",
    "write_bytes",
]

_LOCAL, _S3, _OTHER = LocalStore(), S3Store(), OtherStore()


def describe(uri: str) -> str:
    """Where a URI leads and as whom, in words without any secret."""
    store, uri = _store(uri)
    return store.describe(uri)


def read_bytes(uri: str) -> bytes:
    """Read a whole object.

    Raises:
        FileNotFoundError: when there is none.
        StorageError: when the store refuses or fails.
    """
    return read_versioned(uri)[0]


def read_versioned(uri: str) -> tuple[bytes, str | None]:
    """Read a whole object with the version that `replace_bytes` takes: the store's, or for local files their digest.

    Raises:
        FileNotFoundError: when there is none.
        StorageError: when the store refuses or fails.
    """
    store, uri = _store(uri)
    return store.read(uri)


def read_range(uri: str, start: int, stop: int, *, version: str | None = None) -> bytes:
    """Read exactly the bytes start to stop, stop not among them, in one request.

    Args:
        uri: Of the object.
        start: First byte, from 0.
        stop: Byte after the last.
        version: Read this version only, where the store has versions.

    Raises:
        FileNotFoundError: when there is no object.
        ChangedError: it is there in another version.
        OutOfRangeError: it ends before `stop`.
        StorageError: when the store refuses or fails.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"no range: {start} to {stop}")
    if start == stop:
        return b""
    store, uri = _store(uri)
    return store.read_range(uri, start, stop, version)


def stat(uri: str) -> Stat:
    """Size, version and time of an object.

    Raises:
        FileNotFoundError: when there is none; folders are no objects.
        StorageError: when the store refuses or fails.
    """
    store, uri = _store(uri)
    return store.stat(uri)


def write_bytes(uri: str, data: bytes) -> str | None:
    """Write a whole object; readers see the old one or the new one, never a part.

    Returns:
        The store's version of what was written; None for local files.

    Raises:
        StorageError: when the store refuses or fails.
    """
    store, uri = _store(uri)
    return store.write(uri, data)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write an object only if there is none: of several writers at once, exactly one gets True.

    After a lost answer the object is compared with `data`, so give each writer's data something of its own.

    Raises:
        StorageError: when the store refuses or fails.
    """
    store, uri = _store(uri)
    return store.create(uri, data)


def replace_bytes(uri: str, data: bytes, *, version: str) -> str | None:
    """Replace an object only if it still has the version that `read_versioned` gave.

    Returns:
        The new version; None when another one is there, or none.

    Raises:
        StorageError: when the store refuses, fails, or cannot do this.
    """
    store, uri = _store(uri)
    try:
        return store.replace(uri, data, version)
    except FileNotFoundError:
        return None


def can_swap(uri: str) -> bool:
    """Whether `replace_bytes` is there for this store: for local folders and S3 it is."""
    return _store(uri)[0].swaps


def list_names(uri: str) -> list[str]:
    """Names directly inside a folder, sorted; empty when the folder does not exist."""
    folders, files = list_level(uri)
    return sorted(one.rpartition("/")[2] for one in (*folders, *(file.uri for file in files)))


def list_files(uri: str) -> list[tuple[str, int]]:
    """(URI, bytes) of all files below a folder, sorted, so that a listing is the same on every machine."""
    return sorted((one.uri, one.bytes) for page in scan(uri) for one in page)


def scan(uri: str) -> Iterator[list[Entry]]:
    """All objects below a folder in pages of at most 1000, sorted by the bytes of their keys.

    For S3 a page is one request and all that is in memory; for local files, the folders on the way are.
    """
    store, uri = _store(uri)
    return store.scan(uri)


def list_level(uri: str) -> tuple[list[str], list[Entry]]:
    """URIs of the folders directly inside, and the objects there, each sorted; both empty when it does not exist."""
    store, uri = _store(uri)
    return store.level(uri)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    store, uri = _store(uri)
    return store.exists(uri)


def delete_folder(uri: str) -> None:
    """Delete a folder and all in it; nothing happens when it is absent. Never a whole bucket."""
    store, uri = _store(uri)
    store.delete_folder(uri)


def delete_file(uri: str) -> None:
    """Delete one file; nothing happens when it is absent."""
    store, uri = _store(uri)
    store.delete_file(uri)


def counters() -> Counters:
    """Requests, bytes and retries of this process so far."""
    return METER.total()


def _store(uri: str) -> tuple[Store, str]:
    uri = normalise(uri)
    if is_local(uri):
        return _LOCAL, uri
    return (_S3 if scheme_of(uri) in S3_SCHEMES else _OTHER), uri
