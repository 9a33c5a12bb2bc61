"""Stores other than S3, through fsspec: Google Cloud, Azure and what else has a package installed.

Their own clients retry and resolve credentials; what is promised here is less than for S3: a version is used only as
far as the store's listing shows an ETag, put-if-absent is as safe as that package makes it, and there is no
compare-and-swap: what fsspec's packages share has no name for it.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from datetime import datetime
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs as pafs

from simclr_ray.errors import StorageError
from simclr_ray.storage import settings
from simclr_ray.storage.counting import METER
from simclr_ray.storage.kinds import Entry, Stat, digest, ends_early
from simclr_ray.storage.redaction import GONE, redact
from simclr_ray.storage.uris import OTHER_SCHEMES, S3_SCHEMES, WEB_SCHEMES, scheme_of, tellable

PAGE = 1000
_ARROW_SCHEMES = frozenset({"gs", "gcs", "abfs", "abfss"})
_WEB_ADDRESS = re.compile(r"(?i)\bhttps?://[^\s'\"<>)]+")


class OtherStore:
    """The backend for every scheme that fsspec knows and that is allowed here."""

    swaps: ClassVar[bool] = False

    def describe(self, uri: str) -> str:
        """The scheme's client."""
        with _opened(uri, "looked up") as (files, path):
            return f"{tellable(path)} through {type(files).__name__} of fsspec; credentials: as that client finds them"

    def read(self, uri: str) -> tuple[bytes, str | None]:
        """Whole object and its digest."""
        with _opened(uri, "read") as (files, path):
            data = bytes(files.cat_file(path))
        METER.read(len(data))
        return data, digest(data)

    def read_range(self, uri: str, start: int, stop: int, version: str | None) -> bytes:
        """Bytes start to stop; the version is not looked at."""
        with _opened(uri, "read") as (files, path):
            data = bytes(files.cat_file(path, start=start, end=stop))
            if len(data) != stop - start:
                raise ends_early(uri, start, stop, int(files.info(path)["size"]))
        METER.read(len(data))
        return data

    def stat(self, uri: str) -> Stat:
        """Size, ETag where there is one, and time."""
        with _opened(uri, "looked up") as (files, path):
            info = files.info(path)
            if info["type"] == "directory":
                raise FileNotFoundError(uri)
        return Stat(int(info["size"] or 0), _version(info), _modified(info))

    def write(self, uri: str, data: bytes) -> str | None:
        """One put."""
        with _opened(uri, "written") as (files, path):
            _make_parents(files, path)
            files.pipe_file(path, data)
        METER.wrote(len(data))
        return None

    def create(self, uri: str, data: bytes) -> bool:
        """Put if absent, by the package's own means."""
        with _opened(uri, "written") as (files, path):
            _make_parents(files, path)
            try:
                files.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
        METER.wrote(len(data))
        return True

    def replace(self, uri: str, data: bytes, version: str) -> str | None:
        """Not offered.

        Raises:
            StorageError: always: without the store's help two writers could both win.
        """
        raise StorageError(
            "this kind of store has no compare-and-swap here",
            where=redact(tellable(uri)),
            expected="a local path or s3://",
        )

    def scan(self, uri: str) -> Iterator[list[Entry]]:
        """All objects below; fsspec lists them at once, so they are all in memory here."""
        with _opened(uri, "listed") as (files, path):
            try:
                found = files.find(path, detail=True)
            except FileNotFoundError:
                return
            entries = [_entry(uri, path, info) for info in found.values() if info["type"] == "file"]
        entries = sorted((one for one in entries if one.uri != uri), key=lambda one: one.uri.encode())
        for first in range(0, len(entries), PAGE):
            yield entries[first : first + PAGE]

    def level(self, uri: str) -> tuple[list[str], list[Entry]]:
        """Folders and objects directly inside."""
        with _opened(uri, "listed") as (files, path):
            try:
                found = [one for one in files.ls(path, detail=True) if _bare(one["name"]) != _bare(path)]
            except FileNotFoundError:
                return [], []
        entries = [(one["type"], _entry(uri, path, one)) for one in found]
        folders = sorted(one.uri for kind, one in entries if kind == "directory")
        return folders, sorted((one for kind, one in entries if kind == "file"), key=lambda one: one.uri)

    def exists(self, uri: str) -> bool:
        """Whether an object or a folder is there."""
        with _opened(uri, "looked up") as (files, path):
            return bool(files.exists(path))

    def delete_file(self, uri: str) -> None:
        """Delete; nothing happens when it is absent."""
        with _opened(uri, "deleted") as (files, path), contextlib.suppress(FileNotFoundError):
            files.rm_file(path)

    def delete_folder(self, uri: str) -> None:
        """Delete all below; nothing happens when it is absent."""
        with _opened(uri, "deleted") as (files, path), contextlib.suppress(FileNotFoundError):
            if not _bare(path):
                raise StorageError("a whole store is never deleted", where=uri)
            files.rm(path, recursive=True)


@contextlib.contextmanager
def _opened(uri: str, verb: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URI and the path in it; a refusal becomes our sentence.

    Raises:
        StorageError: the scheme is not allowed or needs a package, or the store refuses.
    """
    METER.request()
    try:
        yield _resolve(uri)
    except StorageError:
        raise
    except FileNotFoundError as error:
        if link_local := _link_local_in(error):  # the web client takes all that fails for an absent object
            raise StorageError(str(link_local), where=redact(tellable(uri))) from None
        raise FileNotFoundError(2, "no such object", redact(tellable(uri))) from None
    except Exception as error:  # each package has its own errors
        said = _link_local_in(error) or error
        raise StorageError(
            f"cannot be {verb}: {_told(said, uri) or type(error).__name__}", where=redact(tellable(uri)),
            fix="check the URI, the credentials and the permissions",
        ) from None  # fmt: skip


def _resolve(uri: str) -> tuple[Any, str]:
    scheme = scheme_of(uri)
    if scheme in WEB_SCHEMES and not settings.current().allow_http:
        raise StorageError(
            "web addresses are not read, for a list could point into the cluster's own network",
            where=redact(tellable(uri)),
            fix="copy the objects to a store, or set storage.allow_http=true if you trust every address",
        )  # fmt: skip
    if scheme not in OTHER_SCHEMES | WEB_SCHEMES:
        known = ", ".join(sorted(S3_SCHEMES | OTHER_SCHEMES))
        raise StorageError(f'unknown scheme "{scheme}"', where=redact(uri), expected=f"a path, or one of {known}")
    try:
        options = {"get_client": _web_client} if scheme in WEB_SCHEMES else {}
        files, path = fsspec.core.url_to_fs(uri, **options)
    except ImportError as error:
        if scheme in _ARROW_SCHEMES:  # pyarrow has a client of its own for these
            arrow_files, path = pafs.FileSystem.from_uri(uri)
            return ArrowFSWrapper(arrow_files), path
        raise StorageError(f"{scheme}:// needs a package: {error}", where=uri, fix="install it on every node") from None
    return files, path


class LinkLocalError(Exception):
    """A connection would go to an address at which machines keep their secrets."""


async def _web_client(**options: Any) -> Any:
    """A client that opens no connection to a link-local address.

    Looked at is the address itself, of every connection: no host's name, redirect or change of a name's address
    between two look-ups leads around it.
    """
    import aiohttp  # only where the web is read

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=_socket), **options)


def _socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, _, place = address
    if settings.is_link_local(str(place[0])):
        raise LinkLocalError("it leads to a link-local address, which is never read, for machines keep secrets there")
    return socket.socket(family, kind, protocol)


def _link_local_in(error: BaseException | None) -> LinkLocalError | None:
    """That error, if it is what another one came from."""
    while error is not None and not isinstance(error, LinkLocalError):
        error = error.__cause__ or error.__context__
    return error


def _told(error: BaseException, uri: str) -> str:
    """What an error says, without what signs the web addresses in it, even where a server repeats it alone."""
    text = _WEB_ADDRESS.sub(lambda match: tellable(match.group()), str(error))
    query = uri.partition("?")[2] if scheme_of(uri) in WEB_SCHEMES else ""
    return redact(text.replace(query, GONE) if query else text)


def _make_parents(files: Any, path: str) -> None:
    """Folders exist only in some of these stores; where they do, a put needs them."""
    parent = path.rpartition("/")[0]
    if parent:
        files.makedirs(parent, exist_ok=True)


def _entry(uri: str, path: str, info: dict[str, Any]) -> Entry:
    inside = _bare(info["name"]).removeprefix(_bare(path)).strip("/")
    return Entry(f"{uri}/{inside}" if inside else uri, int(info.get("size") or 0), _version(info))


def _bare(path: str) -> str:
    return path.strip("/")


def _version(info: dict[str, Any]) -> str | None:
    tag = info.get("etag") or info.get("ETag")
    return str(tag).strip('"') if tag else None


def _modified(info: dict[str, Any]) -> float:
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
