"""Stores behind fsspec, on the one that needs no server; and schemes that are not opened."""

from __future__ import annotations

import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from simclr_ray import storage
from simclr_ray.errors import StorageError


@pytest.fixture
def folder() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_every_operation(folder: str) -> None:
    uri = f"{folder}/a/b"
    storage.write_bytes(uri, b"hello")
    assert storage.read_bytes(uri) == b"hello"
    assert storage.read_range(uri, 1, 3) == b"el"
    assert storage.stat(uri).bytes == 5
    assert storage.exists(uri)
    assert storage.exists(f"{folder}/a")
    assert not storage.exists(f"{folder}/q")
    storage.write_bytes(f"{folder}/a.txt", b"1")
    assert storage.list_files(folder) == [(f"{folder}/a.txt", 1), (uri, 5)]
    assert [entry.uri for page in storage.scan(folder) for entry in page] == [f"{folder}/a.txt", uri]
    assert storage.list_level(folder) == ([f"{folder}/a"], [storage.Entry(f"{folder}/a.txt", 1, None)])
    assert storage.list_names(folder) == ["a", "a.txt"]
    storage.delete_file(uri)
    storage.delete_file(uri)
    assert not storage.exists(uri)
    storage.delete_folder(folder)
    storage.delete_folder(folder)
    assert storage.list_files(folder) == []


def test_put_if_absent(folder: str) -> None:
    assert storage.create_bytes(f"{folder}/lock", b"1")
    assert not storage.create_bytes(f"{folder}/lock", b"2")
    assert storage.read_bytes(f"{folder}/lock") == b"1"


def test_what_is_absent_or_short(folder: str) -> None:
    for read in (storage.read_bytes, storage.stat, lambda uri: storage.read_range(uri, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read(f"{folder}/none")
    storage.write_bytes(f"{folder}/f", b"12")
    with pytest.raises(storage.OutOfRangeError, match="2 bytes"):
        storage.read_range(f"{folder}/f", 0, 3)


def test_swapping_is_refused_where_two_could_win(folder: str) -> None:
    assert not storage.can_swap(folder)
    assert storage.can_swap("/folder")
    assert storage.can_swap("s3://bucket/key")
    with pytest.raises(StorageError, match="no compare-and-swap"):
        storage.replace_bytes(f"{folder}/f", b"", version="x")


@pytest.mark.parametrize("uri", ["nope://x/y", "ftp://h/f", "simplecache::s3://b/k", "github://a:b@/x"])
def test_an_unknown_scheme_is_a_sentence(uri: str) -> None:
    with pytest.raises(StorageError, match="unknown scheme"):
        storage.read_bytes(uri)


def test_the_web_is_read_only_where_that_is_allowed(configure: Callable[[storage.StorageSettings], None]) -> None:
    uri = "http://127.0.0.1:9/latest/meta-data"
    with pytest.raises(StorageError, match="web addresses are not read"):
        storage.read_bytes(uri)
    configure(storage.StorageSettings(allow_http=True))
    with pytest.raises(StorageError, match="cannot be read"):  # nobody listens there
        storage.read_bytes(uri)


class Pages(BaseHTTPRequestHandler):
    """`/image` is there, `/to/<address>` leads to that address, and everything else needs another signature."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path, _, query = self.path.partition("?")
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", f"http://{path.removeprefix('/to/')}")
        else:
            self.send_response(200 if path == "/image" else 404 if path == "/absent" else 403, query)
        self.send_header("Content-Length", "5" if path == "/image" else "0")
        self.end_headers()
        if path == "/image" and self.command == "GET":
            self.wfile.write(b"pixel")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(configure: Callable[[storage.StorageSettings], None]) -> Iterator[str]:
    """A web server of this test, allowed."""
    configure(storage.StorageSettings(allow_http=True))
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_web_is_read_and_redirects_are_followed(web: str) -> None:
    assert storage.read_bytes(f"{web}/image?signed=p4ss") == b"pixel"
    assert "/image?signed=p4ss" in Pages.asked
    assert storage.read_bytes(f"{web}/to/{web.removeprefix('http://')}/image") == b"pixel"
    assert storage.read_range(f"{web}/image", 0, 5) == b"pixel"
    assert storage.stat(f"{web}/image").bytes == 5


@pytest.mark.parametrize("operation", [storage.read_bytes, storage.stat, lambda uri: storage.read_range(uri, 0, 1)])
@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "169.254.170.2:80", "0xA9FEA9FE", "{web}/to/169.254.169.254", "{web}/to/0xA9FEA9FE"],
)
def test_no_way_leads_to_a_link_local_address(web: str, address: str, operation: Callable[[str], object]) -> None:
    """Not by its number, by another way to write it, which the system's resolver knows, or by a redirect."""
    begun = time.monotonic()
    with pytest.raises(StorageError, match="link-local"):
        operation(f"http://{address.format(web=web.removeprefix('http://'))}/latest/meta-data")
    assert time.monotonic() - begun < 5, "no connection was tried"


@pytest.mark.parametrize("operation", [storage.read_bytes, storage.stat, lambda uri: storage.read_range(uri, 0, 1)])
@pytest.mark.parametrize("page", ["refused", "absent"])
def test_an_error_does_not_tell_the_signature_of_an_address(
    web: str, page: str, operation: Callable[[str], object]
) -> None:
    secret = uuid.uuid4().hex
    with pytest.raises((StorageError, FileNotFoundError)) as caught:
        operation(f"{web}/{page}?Policy={secret}")
    text = "".join(traceback.format_exception(caught.value))
    assert f"{web}/{page}?[redacted]" in str(caught.value)
    assert secret not in text


def test_a_store_whose_package_is_missing_says_so() -> None:
    with pytest.raises(StorageError, match="needs a package"):
        storage.read_bytes("oss://bucket/key")
