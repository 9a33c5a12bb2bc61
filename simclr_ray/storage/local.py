"""Files of this machine, or of a folder that all machines mount.

Writes go beside and are renamed; a file that must not exist yet is linked into place, which exactly one of several
writers can do. Local files have no version of the store's; compare-and-swap goes by the content's digest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from simclr_ray.errors import StorageError
from simclr_ray.storage.counting import METER
from simclr_ray.storage.kinds import Entry, Stat, digest, ends_early

PAGE = 1000
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class LocalStore:
    """The backend for paths."""

    swaps: ClassVar[bool] = True

    def describe(self, uri: str) -> str:
        """The path's disk."""
        folder = Path(uri)
        while not folder.exists():
            folder = folder.parent
        return f"local folder {uri}, {shutil.disk_usage(folder).free / 2**30:,.1f} GiB free"

    def read(self, uri: str) -> tuple[bytes, str | None]:
        """Whole file and its digest."""
        with _explained(uri, "read"):
            data = Path(uri).read_bytes()
        METER.request()
        METER.read(len(data))
        return data, digest(data)

    def read_range(self, uri: str, start: int, stop: int, version: str | None) -> bytes:
        """Bytes start to stop; the version is not looked at."""
        METER.request()
        with _explained(uri, "read"), Path(uri).open("rb", buffering=0) as file:
            parts, at = [], start
            while at < stop and (part := os.pread(file.fileno(), stop - at, at)):
                parts.append(part)
                at += len(part)
            if at < stop:
                raise ends_early(uri, start, stop, os.fstat(file.fileno()).st_size)
        METER.read(stop - start)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def stat(self, uri: str) -> Stat:
        """Size and time; no version."""
        METER.request()
        with _explained(uri, "looked up"):
            found = Path(uri).stat()
            if Path(uri).is_dir():
                raise FileNotFoundError(errno.ENOENT, "is a folder", uri)
        return Stat(found.st_size, None, found.st_mtime)

    def write(self, uri: str, data: bytes) -> str | None:
        """Write beside and rename."""
        with _explained(uri, "written"), _beside(Path(uri), data) as beside:
            beside.replace(uri)
        return None

    def create(self, uri: str, data: bytes) -> bool:
        """Write beside and link into place, which fails where the name is taken."""
        with _explained(uri, "written"), _beside(Path(uri), data) as beside:
            try:
                os.link(beside, uri)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_without_links(uri, data)
        return True

    def replace(self, uri: str, data: bytes, version: str) -> str | None:
        """Swap under a lock on the folder, if the content's digest is still `version`."""
        with _explained(uri, "replaced"):
            folder = os.open(Path(uri).parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                if digest(Path(uri).read_bytes()) != version:
                    return None
                with _beside(Path(uri), data) as beside:
                    beside.replace(uri)
            finally:
                os.close(folder)
        return digest(data)

    def scan(self, uri: str) -> Iterator[list[Entry]]:
        """All files below, in the order an object store would list their names."""
        page: list[Entry] = []
        for entry in _walk(uri, ()):
            page.append(entry)
            if len(page) == PAGE:
                yield page
                page = []
        if page:
            yield page

    def level(self, uri: str) -> tuple[list[str], list[Entry]]:
        """Folders and files directly inside."""
        found = _entries(uri)
        folders = [one.path for one in found if one.is_dir()]
        return folders, [_entry(one) for one in found if one.is_file()]

    def exists(self, uri: str) -> bool:
        """Whether a file or a folder is there."""
        METER.request()
        with _explained(uri, "looked up"):
            return Path(uri).exists()

    def delete_file(self, uri: str) -> None:
        """Unlink; nothing happens when it is absent."""
        METER.request()
        with _explained(uri, "deleted"):
            Path(uri).unlink(missing_ok=True)

    def delete_folder(self, uri: str) -> None:
        """Remove a tree; nothing happens when it is absent."""
        METER.request()
        if uri == "/":
            raise StorageError("the root of this machine is never deleted", where=uri)
        with _explained(uri, "deleted"), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(uri)


@contextlib.contextmanager
def _beside(target: Path, data: bytes) -> Iterator[Path]:
    """A finished, synced file next to the target, gone at the end if it is still there."""
    METER.request()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        METER.wrote(len(data))
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def _create_without_links(uri: str, data: bytes) -> bool:
    """For file systems without hard links: one creator still, but a reader may see it half written."""
    try:
        with Path(uri).open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError:
        return False
    return True


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder, in the order of an object store's keys: a folder `a` stands where `a/` would."""
    METER.request()
    with _explained(folder, "listed"):
        try:
            with os.scandir(folder) as found:
                return sorted(found, key=lambda one: os.fsencode(one.name) + (b"/" if one.is_dir() else b""))
        except FileNotFoundError:
            return []


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """Files below a folder; a link back to a folder above is not followed."""
    for one in _entries(folder):
        if one.is_dir():
            found = one.stat()
            here = (found.st_dev, found.st_ino)
            if here not in above:
                yield from _walk(one.path, (*above, here))
        elif one.is_file():
            yield _entry(one)


def _entry(one: os.DirEntry[str]) -> Entry:
    return Entry(one.path, one.stat().st_size, None)


@contextlib.contextmanager
def _explained(uri: str, verb: str) -> Iterator[None]:
    """Turn a refusal of the system into our sentence; a missing file stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot be {verb}: {reason}", where=uri, fix="check the path and the permissions") from None
