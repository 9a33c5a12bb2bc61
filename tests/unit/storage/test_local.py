"""Local files: whole writes, ranges, put-if-absent, compare-and-swap, listings in the order of an object store."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray import storage
from simclr_ray.errors import StorageError
from simclr_ray.storage import local


def test_a_write_appears_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "file")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.list_names(str(tmp_path / "deep")) == ["file"]


def test_a_missing_file_is_file_not_found_and_a_missing_folder_is_empty(tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    for read in (storage.read_bytes, storage.stat, lambda uri: storage.read_range(uri, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read(none)
    assert storage.list_names(none) == []
    assert storage.list_files(none) == []
    assert storage.list_level(none) == ([], [])
    storage.delete_folder(none)
    storage.delete_file(none)
    assert not storage.exists(none)


def test_a_folder_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.stat(str(tmp_path))
    with pytest.raises(StorageError):
        storage.read_bytes(str(tmp_path))


def test_listing_is_recursive_sorted_and_absolute(tmp_path: Path) -> None:
    for name in ("b/2", "a/1", "c"):
        storage.write_bytes(str(tmp_path / name), b"x" * len(name))
    assert storage.list_files(str(tmp_path)) == [(str(tmp_path / n), len(n)) for n in ("a/1", "b/2", "c")]


NAMES = st.text(st.sampled_from("ab.-0_/"), min_size=1, max_size=8).filter(
    lambda name: all(part not in ("", ".", "..") for part in name.split("/"))
)


@settings(max_examples=60, deadline=None)
@given(st.sets(NAMES, min_size=1, max_size=30), st.integers(1, 7))
def test_a_scan_has_the_order_of_keys_and_every_file_once(names: set[str], page: int) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "PAGE", page)
        kept = []
        for name in sorted(names):
            try:
                storage.write_bytes(f"{folder}/{name}", name.encode())
                kept.append(name)
            except (StorageError, NotADirectoryError):
                pass  # a file and a folder cannot have one name
        pages = list(storage.scan(folder))
        assert [entry.uri for one in pages for entry in one] == [
            f"{folder}/{name}" for name in sorted(kept, key=str.encode)
        ]
        assert all(len(one) == page for one in pages[:-1])
        assert all(entry.bytes == len(entry.uri) - len(folder) - 1 for one in pages for entry in one)


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "none")
    listed = [uri.removeprefix(f"{tmp_path}/") for uri, _ in storage.list_files(str(tmp_path))]
    assert "a/f" in listed
    assert len(listed) < 5


def test_a_level_tells_folders_from_files(tmp_path: Path) -> None:
    for name in ("x/1", "y/z/2", "f"):
        storage.write_bytes(str(tmp_path / name), b"12")
    folders, files = storage.list_level(str(tmp_path))
    assert folders == [str(tmp_path / "x"), str(tmp_path / "y")]
    assert files == [storage.Entry(str(tmp_path / "f"), 2, None)]


@given(data=st.binary(min_size=1, max_size=300), cut=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_a_range_is_a_slice_or_says_that_the_file_is_short(data: bytes, cut: tuple[int, int]) -> None:
    start, stop = sorted(cut)
    with TemporaryDirectory() as folder:
        storage.write_bytes(f"{folder}/f", data)
        if stop <= len(data) or start == stop:
            assert storage.read_range(f"{folder}/f", start, stop) == data[start:stop]
        else:
            with pytest.raises(storage.OutOfRangeError, match=f"{len(data)} bytes"):
                storage.read_range(f"{folder}/f", start, stop)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4)])
def test_a_range_that_is_none_is_our_own_mistake(tmp_path: Path, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        storage.read_range(str(tmp_path), start, stop)


@pytest.mark.parametrize("with_links", [True, False])
def test_of_many_creators_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_links: bool) -> None:
    if not with_links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(1, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    uri = str(tmp_path / "deep" / "lock")
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: storage.create_bytes(uri, b"%d" % n), range(16)))
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)
    assert storage.list_names(str(tmp_path / "deep")) == ["lock"]


def test_of_many_swaps_from_one_version_one_wins(tmp_path: Path) -> None:
    uri = str(tmp_path / "lock")
    storage.write_bytes(uri, b"old")
    _, version = storage.read_versioned(uri)
    assert version is not None
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: storage.replace_bytes(uri, b"%d" % n, version=version), range(16)))
    winner = next(index for index, one in enumerate(won) if one is not None)
    assert sum(one is not None for one in won) == 1
    assert storage.read_versioned(uri) == (b"%d" % winner, won[winner])
    assert storage.replace_bytes(uri, b"x", version=version) is None
    assert storage.replace_bytes(str(tmp_path / "none"), b"x", version=version) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_refused_write_names_the_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=str(tmp_path)):
        storage.write_bytes(str(tmp_path / "x"), b"")


def test_a_path_where_a_folder_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StorageError):
        storage.write_bytes(str(tmp_path / "f" / "x"), b"")


def test_the_root_is_never_deleted() -> None:
    with pytest.raises(StorageError, match="never deleted"):
        storage.delete_folder("/")


def test_requests_and_bytes_are_counted(tmp_path: Path) -> None:
    before = storage.counters()
    storage.write_bytes(str(tmp_path / "f"), b"12345")
    storage.read_range(str(tmp_path / "f"), 1, 4)
    after = storage.counters()
    assert (after.requests - before.requests, after.bytes - before.bytes) == (2, 3)
    assert after.bytes_written - before.bytes_written == 5
