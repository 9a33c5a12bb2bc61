from __future__ import annotations

import os
from pathlib import Path

import pytest

from simclr_ray import storage
from simclr_ray.errors import StorageError


def test_a_write_appears_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    uri = str(tmp_path / "deep" / "file")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.list_names(str(tmp_path / "deep")) == ["file"]


def test_a_missing_file_is_file_not_found_and_a_missing_folder_is_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "none"))
    assert storage.list_names(str(tmp_path / "none")) == []
    assert storage.list_files(str(tmp_path / "none")) == []
    storage.delete_folder(str(tmp_path / "none"))
    storage.delete_file(str(tmp_path / "none"))


def test_listing_is_recursive_sorted_and_absolute(tmp_path: Path) -> None:
    for name in ("b/2", "a/1", "c"):
        storage.write_bytes(str(tmp_path / name), b"x" * len(name))
    assert storage.list_files(str(tmp_path)) == [(str(tmp_path / n), len(n)) for n in ("a/1", "b/2", "c")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_refused_write_names_the_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=str(tmp_path)):
        storage.write_bytes(str(tmp_path / "x"), b"")


def test_an_unknown_scheme_is_a_sentence() -> None:
    with pytest.raises(StorageError, match="nope://x"):
        storage.filesystem("nope://x/y")


def test_join_keeps_full_uris() -> None:
    assert storage.join("/a", "b", "c") == "/a/b/c"
    assert storage.join("/a", "s3://b/c") == "s3://b/c"
    assert storage.join("s3://a/", "b") == "s3://a/b"


def test_a_path_where_a_folder_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(StorageError):
        storage.write_bytes(str(tmp_path / "f" / "x"), b"")
