"""One door to local folders and object stores: a URI in, bytes and pyarrow filesystems out.

`s3://` goes through pyarrow, which reads AWS_ENDPOINT_URL and the usual credential chain; other schemes go through
fsspec. A filesystem is resolved in the process that uses it and never pickled, so no credential travels. Writes
appear whole or not at all: an object store's put is atomic, and a local file is written beside and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
from pyarrow import fs as pafs

from simclr_ray.errors import StorageError


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return "://" not in uri or uri.startswith("file://")


def normalise(uri: str | Path) -> str:
    """Absolute local path, or the URI without a trailing slash; workers change their folder, so paths are absolute."""
    text = str(uri)
    if not is_local(text):
        return text.rstrip("/")
    return str(Path(text.removeprefix("file://")).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    """Append path parts; a part that is absolute or a URI itself replaces what came before."""
    for part in parts:
        uri = part if part.startswith("/") or "://" in part else f"{uri.rstrip('/')}/{part}"
    return uri


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Resolve a URI to a pyarrow filesystem and the path inside it.

    Raises:
        StorageError: when the scheme is unknown or the store refuses.
    """
    uri = normalise(uri)
    try:
        if is_local(uri):
            return pafs.LocalFileSystem(), uri
        if uri.startswith(("s3://", "gs://", "gcs://")):
            filesystem_, path = pafs.FileSystem.from_uri(uri)
            return filesystem_, path
        handler, path = fsspec.core.url_to_fs(uri)
        return pafs.PyFileSystem(pafs.FSSpecHandler(handler)), path
    except (OSError, ValueError, ImportError) as error:
        raise StorageError(
            f"cannot be opened: {error}", where=uri, fix="check the scheme and the credentials"
        ) from None


def read_bytes(uri: str) -> bytes:
    """Read a whole object.

    Raises:
        FileNotFoundError: when there is none.
        StorageError: when the store refuses or fails.
    """
    files, path = filesystem(uri)
    with _explained(uri, "read"), files.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object; readers see the old one or the new one, never a part."""
    uri = normalise(uri)
    files, path = filesystem(uri)
    with _explained(uri, "written"):
        if is_local(uri):
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                with beside.open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                beside.replace(target)
            finally:
                beside.unlink(missing_ok=True)
        else:
            with files.open_output_stream(path) as stream:
                stream.write(data)


def list_names(uri: str) -> list[str]:
    """Names directly inside a folder, sorted; empty when the folder does not exist."""
    files, path = filesystem(uri)
    with _explained(uri, "listed"):
        infos = files.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def list_files(uri: str) -> list[tuple[str, int]]:
    """(URI, bytes) of all files below a folder, sorted, so that a listing is the same on every machine."""
    uri = normalise(uri)
    files, path = filesystem(uri)
    with _explained(uri, "listed"):
        infos = files.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    prefix = uri[: len(uri) - len(path)] if uri.endswith(path) else f"{uri.split('://', 1)[0]}://"
    return sorted((prefix + info.path, info.size) for info in infos if info.is_file)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    files, path = filesystem(uri)
    with _explained(uri, "looked up"):
        return bool(files.get_file_info(path).type != pafs.FileType.NotFound)


def delete_folder(uri: str) -> None:
    """Delete a folder and all in it; nothing happens when it is absent."""
    files, path = filesystem(uri)
    with _explained(uri, "deleted"), contextlib.suppress(FileNotFoundError):
        files.delete_dir(path)


def delete_file(uri: str) -> None:
    """Delete one file; nothing happens when it is absent."""
    files, path = filesystem(uri)
    with _explained(uri, "deleted"), contextlib.suppress(FileNotFoundError):
        files.delete_file(path)


def digest(data: bytes) -> str:
    """Content digest: 128-bit BLAKE2b as 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextlib.contextmanager
def _explained(uri: str, verb: str) -> Iterator[None]:
    """Turn a store's refusal into our sentence; a missing file stays FileNotFoundError for callers that expect it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot be {verb}: {reason}", where=uri, fix="check the path and the permissions") from None
