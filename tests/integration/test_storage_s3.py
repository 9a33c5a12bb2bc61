"""Every operation on a real S3 server, and the sentence for every refusal that it gives."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simclr_ray import storage
from simclr_ray.config import ClusterConfig
from simclr_ray.errors import StorageError
from simclr_ray.train.cluster import connected
from tests.servers.seaweed import READER_ACCESS_KEY, READER_SECRET_KEY, SECRET_KEY, Seaweed

Configure = Callable[[storage.StorageSettings], None]


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_an_object_is_written_read_looked_up_and_deleted(s3_folder: str) -> None:
    uri = f"{s3_folder}/deep/object"
    assert storage.write_bytes(uri, b"one") == md5(b"one")
    version = storage.write_bytes(uri, b"hello")
    assert version == md5(b"hello")
    assert storage.read_bytes(uri) == b"hello"
    assert storage.read_versioned(uri) == (b"hello", version)
    found = storage.stat(uri)
    assert (found.bytes, found.version) == (5, version)
    assert abs(found.modified - time.time()) < 60
    assert storage.exists(uri)
    assert storage.exists(f"{s3_folder}/deep")
    assert not storage.exists(f"{s3_folder}/dee")
    storage.delete_file(uri)
    storage.delete_file(uri)
    assert not storage.exists(uri)


def test_an_empty_object_is_an_object(s3_folder: str) -> None:
    storage.write_bytes(f"{s3_folder}/empty", b"")
    assert storage.read_bytes(f"{s3_folder}/empty") == b""
    assert storage.stat(f"{s3_folder}/empty").bytes == 0
    with pytest.raises(storage.OutOfRangeError):
        storage.read_range(f"{s3_folder}/empty", 0, 1)


@pytest.mark.parametrize(
    "name", ["a b", "plus+plus", "per%20cent", "ü/ø/日本", "semi;colon", "quote'\"", "hash#mark", "q?x=1"]
)
def test_names_are_taken_as_they_are(s3_folder: str, name: str) -> None:
    uri = f"{s3_folder}/{name}"
    storage.write_bytes(uri, name.encode())
    assert storage.read_bytes(uri) == name.encode()
    assert storage.list_files(s3_folder) == [(uri, len(name.encode()))]
    storage.delete_folder(s3_folder)
    assert storage.list_files(s3_folder) == []


def test_ranges_are_slices_of_one_version(s3_folder: str) -> None:
    uri, data = f"{s3_folder}/object", os.urandom(300_000)
    version = storage.write_bytes(uri, data)
    for start, stop in ((0, 1), (0, len(data)), (1000, 200_001), (len(data) - 1, len(data)), (7, 7)):
        assert storage.read_range(uri, start, stop, version=version) == data[start:stop]
    before = storage.counters()
    storage.read_range(uri, 10, 1010, version=version)
    after = storage.counters()
    assert (after.requests - before.requests, after.bytes - before.bytes) == (1, 1000)


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (4, 10_000), (5, 6), (400, 500)])
def test_a_range_past_the_end_tells_the_size(s3_folder: str, start: int, stop: int) -> None:
    storage.write_bytes(f"{s3_folder}/object", b"12345")
    with pytest.raises(storage.OutOfRangeError, match="got 5 bytes"):
        storage.read_range(f"{s3_folder}/object", start, stop)


def test_another_version_is_told_from_an_absent_object(s3_folder: str) -> None:
    uri = f"{s3_folder}/object"
    version = storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"other")
    with pytest.raises(storage.ChangedError, match="replaced"):
        storage.read_range(uri, 0, 3, version=version)
    storage.delete_file(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_range(uri, 0, 3, version=version)


def test_many_threads_read_their_own_ranges(s3_folder: str) -> None:
    uri, data = f"{s3_folder}/object", os.urandom(4 << 20)
    storage.write_bytes(uri, data)
    step = 1 << 16
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda at: storage.read_range(uri, at, at + step), range(0, len(data), step)))
    assert b"".join(parts) == data


def test_of_sixteen_creators_one_wins(s3_folder: str) -> None:
    uri = f"{s3_folder}/lock"
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: storage.create_bytes(uri, b"%d" % n), range(16)))
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)


def test_of_sixteen_swaps_one_wins(s3_folder: str) -> None:
    uri = f"{s3_folder}/lock"
    storage.write_bytes(uri, b"old")
    _, version = storage.read_versioned(uri)
    assert version is not None
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: storage.replace_bytes(uri, b"%d" % n, version=version), range(16)))
    winners = [index for index, one in enumerate(won) if one is not None]
    assert len(winners) == 1
    assert storage.read_versioned(uri) == (b"%d" % winners[0], won[winners[0]])
    assert storage.replace_bytes(f"{s3_folder}/none", b"", version=version) is None


def test_a_large_object_goes_up_in_parts_and_appears_at_once(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_ray.storage.s3.MULTIPART_BYTES", 11 << 20)
    monkeypatch.setattr("simclr_ray.storage.s3.PART_BYTES", 5 << 20)
    uri, data = f"{s3_folder}/object", os.urandom((12 << 20) + 17)
    version = storage.write_bytes(uri, data)
    assert version is not None
    assert version.endswith("-3")
    assert storage.read_bytes(uri) == data
    assert storage.stat(uri).version == version
    assert not storage.create_bytes(uri, data[::-1])
    assert storage.create_bytes(f"{s3_folder}/new", data)
    assert storage.read_range(uri, 5_000_000, 6_000_000, version=version) == data[5_000_000:6_000_000]


@pytest.fixture(scope="module")
def many(s3: Seaweed) -> tuple[str, list[str]]:
    """2,500 small objects in 25 folders."""
    folder = "s3://train/many"
    uris = [f"{folder}/{n % 25:02d}/{n:05d}.jpg" for n in range(2500)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda uri: storage.write_bytes(uri, b"x" * 10), uris))
    storage.write_bytes("s3://train/many-others/1", b"")
    return folder, sorted(uris)


def test_a_long_listing_comes_in_sorted_pages(many: tuple[str, list[str]]) -> None:
    folder, uris = many
    before = storage.counters().requests
    pages = list(storage.scan(folder))
    assert storage.counters().requests - before == len(pages) == 3
    assert max(map(len, pages)) == 1000
    assert [entry.uri for page in pages for entry in page] == uris
    assert {(entry.bytes, entry.version) for page in pages for entry in page} == {(10, md5(b"x" * 10))}
    assert storage.list_files(folder) == [(uri, 10) for uri in uris]


def test_a_level_has_folders_and_files(many: tuple[str, list[str]]) -> None:
    folder, uris = many
    folders, files = storage.list_level(folder)
    assert folders == [f"{folder}/{n:02d}" for n in range(25)]
    assert files == []
    folders, files = storage.list_level(f"{folder}/07")
    assert folders == []
    assert [entry.uri for entry in files] == [uri for uri in uris if "/07/" in uri]
    assert storage.list_names(folder) == [f"{n:02d}" for n in range(25)]
    assert folder in storage.list_level("s3://train")[0]


def test_a_folder_is_deleted_without_its_neighbours(s3_folder: str) -> None:
    for name in ("a/1", "a/b/2", "ab/3", "a.txt"):
        storage.write_bytes(f"{s3_folder}/{name}", b"x")
    storage.delete_folder(f"{s3_folder}/a")
    storage.delete_folder(f"{s3_folder}/a")
    assert [uri for uri, _ in storage.list_files(s3_folder)] == [f"{s3_folder}/a.txt", f"{s3_folder}/ab/3"]


def test_a_bucket_is_never_deleted(s3: Seaweed) -> None:
    with pytest.raises(StorageError, match="never deleted"):
        storage.delete_folder("s3://train")
    assert storage.exists("s3://train") or storage.list_level("s3://train") == ([], [])


OPERATIONS: dict[str, Callable[[str], object]] = {
    "read": storage.read_bytes,
    "range": lambda uri: storage.read_range(uri, 0, 1),
    "stat": storage.stat,
    "write": lambda uri: storage.write_bytes(uri, b""),
    "create": lambda uri: storage.create_bytes(uri, b""),
    "list": storage.list_names,
    "scan": lambda uri: list(storage.scan(uri)),
    "exists": storage.exists,
    "delete": storage.delete_folder,
}


def refused(operation: str, uri: str) -> str:
    """The sentence, at once and after one attempt."""
    begun, before = time.monotonic(), storage.counters()
    with pytest.raises(StorageError) as caught:
        OPERATIONS[operation](uri)
    assert time.monotonic() - begun < 10
    assert storage.counters().retries == before.retries
    text = str(caught.value)
    assert text.startswith(uri)
    assert SECRET_KEY not in text
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    return text


# This server makes a bucket for a write of its administrator, so writes are left out.
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in ("write", "create")])
def test_an_unknown_bucket_is_named(s3: Seaweed, operation: str) -> None:
    text = refused(operation, "s3://no-such-bucket/key")
    assert 'there is no bucket "no-such-bucket" (NoSuchBucket)' in text
    assert f"asked {s3.endpoint}, region us-east-1; credentials from the environment" in text


def test_a_name_that_no_bucket_can_have_is_a_sentence(s3: Seaweed) -> None:
    assert "cannot be the name of a bucket" in refused("read", "s3://No Bucket!/key")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_key_is_said(
    s3: Seaweed, operation: str, monkeypatch: pytest.MonkeyPatch, configure: Configure
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-knows-this")
    configure(storage.StorageSettings())
    assert "the store does not know this access key (InvalidAccessKeyId)" in refused(operation, "s3://train/x")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_secret_is_said(
    s3: Seaweed, operation: str, monkeypatch: pytest.MonkeyPatch, configure: Configure
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-wrong-secret")
    configure(storage.StorageSettings())
    text = refused(operation, "s3://train/x")
    assert "the secret does not fit the access key (SignatureDoesNotMatch)" in text
    assert "planted-wrong-secret" not in text


def test_rights_are_told_by_operation(
    s3: Seaweed, s3_folder: str, monkeypatch: pytest.MonkeyPatch, configure: Configure
) -> None:
    storage.write_bytes(f"{s3_folder}/object", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET_KEY)
    configure(storage.StorageSettings())
    assert storage.read_bytes(f"{s3_folder}/object") == b"1"
    assert storage.list_names(s3_folder) == ["object"]
    for operation in ("write", "create", "delete"):
        assert "access denied (AccessDenied)" in refused(operation, s3_folder)
    for operation in ("read", "list"):
        assert "access denied (AccessDenied)" in refused(operation, "s3://runs/x")


def test_anonymous_requests_are_unsigned(s3: Seaweed, configure: Configure) -> None:
    configure(storage.StorageSettings(anonymous=True))
    text = refused("read", "s3://train/x")
    assert "access denied" in text
    assert "requests go unsigned" in text


def test_a_password_in_the_endpoint_is_not_told(
    s3: Seaweed, monkeypatch: pytest.MonkeyPatch, configure: Configure
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint.replace("://", "://planted-user:planted-password@"))
    configure(storage.StorageSettings())
    for text in (storage.describe("s3://train/x"), refused("read", "s3://no-such-bucket/key")):
        assert s3.endpoint.removeprefix("http://") in text
        assert "planted" not in text


@pytest.mark.parametrize("path_style", [True, None])
def test_endpoint_and_region_may_come_from_the_settings(
    s3: Seaweed, s3_folder: str, path_style: bool | None, monkeypatch: pytest.MonkeyPatch, configure: Configure
) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    configure(storage.StorageSettings(endpoint=s3.endpoint, region="us-east-1", path_style=path_style))
    storage.write_bytes(f"{s3_folder}/object", b"1")
    program = "import sys; from simclr_ray import storage; print(storage.read_bytes(sys.argv[1]))"
    told = subprocess.run(
        [sys.executable, "-c", program, f"{s3_folder}/object"], check=True, capture_output=True, text=True
    )  # fmt: skip
    assert told.stdout.strip() == "b'1'"
    configure(storage.StorageSettings())  # before the environment is put back


def test_a_credentials_file_is_found_and_named(
    s3: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configure: Configure
) -> None:
    (tmp_path / "credentials").write_text(
        f"[reader]\naws_access_key_id = {READER_ACCESS_KEY}\naws_secret_access_key = {READER_SECRET_KEY}\n"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "reader")
    configure(storage.StorageSettings())
    assert "credentials from the shared credentials file" in refused("write", "s3://train/x")


@pytest.mark.integration
def test_settings_that_cannot_travel_are_said(
    local_ray: None, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(ClusterConfig()):
        assert caplog.messages == []
    configure(storage.StorageSettings(deadline_s=7))
    with connected(ClusterConfig()):
        pass
    assert len(caplog.messages) == 1
    assert "Ray was started before this call" in caplog.messages[0]
    assert "SIMCLR_RAY_STORAGE" in caplog.messages[0]


@pytest.mark.integration
def test_settings_reach_the_tasks_of_a_running_cluster(s3: Seaweed, s3_folder: str, configure: Configure) -> None:
    """A cluster that was started with another endpoint in its environment, as one of another team."""
    storage.write_bytes(f"{s3_folder}/object", b"from a task")
    program = f"""
import os, subprocess, sys
import ray
from ray.cluster_utils import Cluster
endpoint = os.environ.pop("AWS_ENDPOINT_URL_S3")
os.environ["AWS_ENDPOINT_URL_S3"] = "http://127.0.0.1:9"
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False}})
from simclr_ray import storage
from simclr_ray.config import ClusterConfig
from simclr_ray.train.cluster import connected
storage.configure(storage.StorageSettings(endpoint=endpoint, deadline_s=5))

@ray.remote
def task():
    return storage.read_bytes("{s3_folder}/object"), storage.current().deadline_s

with connected(ClusterConfig(address=cluster.address)):
    print(ray.get(task.remote()))
cluster.shutdown()
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr[-3000:]
    assert "(b'from a task', 5)" in told.stdout.replace("5.0", "5")
