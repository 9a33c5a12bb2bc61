"""Stores behind fsspec, on the one that needs no server; and schemes that are not opened."""

from __future__ import annotations

import uuid
from collections.abc import Callable

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
    for host in ("169.254.169.254", "[fe80::1]"):
        with pytest.raises(StorageError, match="link-local"):
            storage.read_bytes(f"http://{host}/latest/meta-data")


def test_a_store_whose_package_is_missing_says_so() -> None:
    with pytest.raises(StorageError, match="needs a package"):
        storage.read_bytes("oss://bucket/key")
