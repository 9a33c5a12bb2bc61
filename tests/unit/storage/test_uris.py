"""Arithmetic of URIs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray import storage
from simclr_ray.errors import StorageError
from simclr_ray.storage.uris import bucket_and_key, scheme_of

KEYS = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)


def test_join_keeps_full_uris() -> None:
    assert storage.join("/a", "b", "c") == "/a/b/c"
    assert storage.join("/a", "s3://b/c") == "s3://b/c"
    assert storage.join("s3://a/", "b") == "s3://a/b"
    assert storage.join("s3://a", "/b") == "/b"


def test_local_paths_become_absolute_and_stores_lose_their_last_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.normalise("x/y/") == str(tmp_path / "x" / "y")
    assert storage.normalise(f"file://{tmp_path}/x") == str(tmp_path / "x")
    assert storage.normalise("s3://b/x/") == "s3://b/x"
    assert storage.normalise(Path("x")) == str(tmp_path / "x")


@given(st.lists(KEYS, min_size=1, max_size=4))
def test_what_is_joined_is_found_again(parts: list[str]) -> None:
    uri = storage.join("s3://bucket", *parts)
    if any("://" in part for part in parts):
        return
    if not any(mark in uri for mark in ("?endpoint_override=", "&endpoint_override=")):
        assert bucket_and_key(uri) == ("bucket", "/".join(parts))
    assert not storage.is_local(uri)


@pytest.mark.parametrize(
    ("uri", "scheme"), [("/a/b", "file"), ("a", "file"), ("file:///a", "file"), ("S3://b/k", "s3"), ("gs://b", "gs")]
)
def test_schemes(uri: str, scheme: str) -> None:
    assert scheme_of(uri) == scheme


@pytest.mark.parametrize("uri", ["s3://AKIAIOSFODNN7EXAMPLE:very-secret-word@bucket/key", "s3://user@bucket/key"])
def test_a_uri_with_a_key_in_it_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(StorageError) as caught:
        storage.read_bytes(uri)
    assert "very-secret-word" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
    assert "credentials come from" in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://bucket/key?endpoint_override=127.0.0.1:9&scheme=http", "s3://bucket?region=x"])
def test_a_uri_with_options_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="takes no options"):
        storage.exists(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key"])
def test_a_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(StorageError):
        bucket_and_key(uri)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("https://h.org/a b.png", "https://h.org/a b.png"),
        ("https://h.org/a.png?se=2030&Policy=p4ss", "https://h.org/a.png?[redacted]"),
        ("HTTPS://h.org:8443/a.png?a=1#b?c", "HTTPS://h.org:8443/a.png?[redacted]"),
        ("http://user:p4ss@h.org/a@b.png#p4ss", "http://h.org/a@b.png"),
        ("http://p4ss@h.org?p4ss", "http://h.org?[redacted]"),
        ("s3://bucket/what?.png#1", "s3://bucket/what?.png#1"),
        ("/folder/what?.png", "/folder/what?.png"),
        ("no uri at all", "no uri at all"),
    ],
)
def test_what_signs_a_web_address_is_not_told(uri: str, told: str) -> None:
    assert storage.tellable(uri) == told
    assert storage.tellable(told) == told


def test_a_list_in_a_store_may_not_name_local_paths() -> None:
    for uri in ("/etc/passwd", "file:///etc/passwd", "relative"):
        assert storage.may_name("/lists/l.txt", uri)
        assert not storage.may_name("s3://bucket/l.txt", uri)
    assert storage.may_name("s3://bucket/l.txt", "gs://bucket/a.png")
    assert storage.may_name("l.txt", "s3://bucket/a.png")
