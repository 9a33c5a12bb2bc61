"""Shards on a real S3 server: how many requests reading takes, and what happens when they are lost or rewritten."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from simclr_ray import storage
from simclr_ray.data import ranges, read_parquet
from simclr_ray.data.decode import REASONS
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.plan import Piece, Plan, UnitTable
from simclr_ray.data.ranges import Source
from simclr_ray.data.read import read_rows
from simclr_ray.data.shards import ImageRow
from simclr_ray.data.units import plan_tasks, read_planned, read_task
from simclr_ray.errors import DataError, StorageError
from tests.conftest import real_rows
from tests.integration.test_stream import stream_steps
from tests.servers.proxy import Fault, Proxy
from tests.servers.seaweed import Seaweed
from tests.unit.data.kinds import KINDS, as_objects, as_parquet, as_tar

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def rows() -> list[ImageRow]:
    return real_rows(80)


def images_of(manifest: Manifest, units: int) -> list[Any]:
    """Ids, images and reasons of the first units."""
    return [
        table.select(["sample_id", "image", "lost_reason"]).to_pylist()
        for task in plan_tasks(manifest, Plan(UnitTable(manifest), 3), 0, units, 2)
        for table in read_task(task)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_from_s3_as_from_disk(
    s3_folder: str, tmp_path: Any, rows: list[ImageRow], kind: str
) -> None:
    KINDS[kind](s3_folder, rows)
    manifest = read_manifest(s3_folder)
    assert all(shard.version for shard in manifest.shards)
    assert images_of(manifest, 7) == images_of(KINDS[kind](str(tmp_path), rows), 7)


@pytest.mark.parametrize(
    ("make", "requests"), [(as_tar, 1), (KINDS["struct"], 2), (as_objects, 2 + 16)], ids=["tar", "parquet", "objects"]
)
def test_a_unit_takes_few_requests(
    s3_folder: str, rows: list[ImageRow], monkeypatch: pytest.MonkeyPatch, make: Callable[..., Manifest], requests: int
) -> None:
    """One for a tar, one more for the footer of a Parquet file, and one for each loose image."""
    manifest = make(s3_folder, rows)
    monkeypatch.setattr(read_parquet, "_FOOTERS", read_parquet._Footers())
    before = storage.counters().requests
    read_rows(manifest, [Piece(0, 1, 0, 16, 16)], [manifest.image_column])
    assert storage.counters().requests - before == requests


def test_a_large_range_is_read_in_parts(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(i * 31 % 253 for i in range(300_000))
    uri = f"{s3_folder}/shard"
    version = storage.write_bytes(uri, data)
    monkeypatch.setattr(ranges, "IN_PARTS_ABOVE", 100_000)
    monkeypatch.setattr(ranges, "PART_BYTES", 40_000)
    before = storage.counters().requests
    assert ranges.read(Source(uri, "tar", len(data), version), 1000, 281_000) == data[1000:281_000]
    assert storage.counters().requests - before == 7


@pytest.mark.parametrize("make", [as_tar, KINDS["struct"], as_objects], ids=["tar", "parquet", "objects"])
def test_a_shard_rewritten_with_the_same_size_is_an_error(
    s3_folder: str, rows: list[ImageRow], make: Callable[..., Manifest]
) -> None:
    """The size tells nothing, the store's version does."""
    manifest = make(s3_folder, rows)
    uri = manifest.shard_uri(1)
    data = storage.read_bytes(uri)
    storage.write_bytes(uri, data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    with pytest.raises(DataError, match="changed since the manifest was written") as caught:
        images_of(manifest, 5)
    assert uri in str(caught.value)


def test_a_loose_image_rewritten_with_the_same_size_is_an_error(s3_folder: str, rows: list[ImageRow]) -> None:
    manifest = as_objects(s3_folder, rows[:40])
    storage.write_bytes(f"{s3_folder}/images/00-005.png", b"x" * len(rows[5].image))
    with pytest.raises(DataError, match="changed since") as caught:
        images_of(manifest, 2)
    assert "00-005.png" in str(caught.value)


def test_a_deleted_shard_is_lost_and_no_more(s3_folder: str, rows: list[ImageRow]) -> None:
    manifest = as_tar(s3_folder, rows)
    storage.delete_file(manifest.shard_uri(1))
    reasons = {row["lost_reason"] for unit in images_of(manifest, 5) for row in unit}
    assert reasons == {-1, REASONS.index("shard_missing")}


def test_a_copied_data_set_is_checked_by_size(s3_folder: str, rows: list[ImageRow]) -> None:
    manifest = as_tar(f"{s3_folder}/before", rows)
    for entry, _ in storage.list_files(f"{s3_folder}/before"):
        storage.write_bytes(entry.replace("/before/", "/after/"), storage.read_bytes(entry))
    copy = read_manifest(f"{s3_folder}/after")
    assert images_of(copy, 5) == images_of(manifest, 5)
    storage.write_bytes(copy.shard_uri(1), storage.read_bytes(copy.shard_uri(1)) + b"\0" * 512)
    with pytest.raises(DataError, match="changed since"):
        images_of(copy, 5)


def test_a_store_that_refuses_is_no_lost_shard(
    s3_folder: str, rows: list[ImageRow], monkeypatch: pytest.MonkeyPatch, configure: Callable[..., None]
) -> None:
    """The data set is there; whoever may not read it must not train on what is left."""
    manifest = as_tar(s3_folder, rows)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    configure(replace(storage.current(), deadline_s=5.0))
    with pytest.raises(StorageError, match="SignatureDoesNotMatch"):
        images_of(manifest, 5)


@pytest.fixture
def proxy(s3: Seaweed, configure: Callable[[storage.StorageSettings], None]) -> Iterator[Proxy]:
    """The store behind a proxy that misbehaves to order."""
    with Proxy(s3.endpoint) as proxy:
        configure(storage.StorageSettings(endpoint=proxy.endpoint, deadline_s=30.0, read_timeout_s=5.0))
        yield proxy


def test_a_slow_store_is_waited_for_once_and_not_for_every_unit(
    s3_folder: str, rows: list[ImageRow], proxy: Proxy
) -> None:
    """Units are read ahead, so four of them take not much longer than the slowest, and their order is kept."""
    manifest = as_tar(s3_folder, rows)
    (task,) = plan_tasks(manifest, Plan(UnitTable(manifest), 3), 0, 4, 4)
    list(read_task(task))  # connections stand
    proxy.fault(Fault("slow", times=-1, method="GET", rate=100_000))
    started = time.perf_counter()
    one_by_one = [read_planned(task, index) for index in range(4)]
    alone = time.perf_counter() - started
    started = time.perf_counter()
    assert list(read_task(task)) == one_by_one
    assert time.perf_counter() - started < 0.6 * alone


@pytest.mark.parametrize(
    "fault", [Fault("status", times=3), Fault("reset", times=2, after=3000), Fault("cut", times=2, after=3000)],
    ids=["503", "reset", "cut"],
)  # fmt: skip
@pytest.mark.parametrize("make", [as_tar, as_objects], ids=["tar", "objects"])
def test_what_passes_costs_no_sample(
    s3_folder: str, rows: list[ImageRow], proxy: Proxy, make: Callable[..., Manifest], fault: Fault
) -> None:
    manifest = make(s3_folder, rows[:40])
    whole = images_of(manifest, 2)
    proxy.fault(replace(fault, method="GET", path="tar|images"))
    before = storage.counters()
    assert images_of(manifest, 2) == whole
    assert storage.counters().requests > before.requests + 2


def test_the_stream_reads_s3_as_it_reads_disk(
    local_ray: None, s3_folder: str, rows: list[ImageRow], tmp_path: Any
) -> None:
    there, here = (stream_steps(make(str(folder), rows), 2, last=2) for make, folder in
                   ((as_tar, s3_folder), (as_parquet, tmp_path)))  # fmt: skip
    for step in (0, 1):
        for (ids, views, rejected), (own_ids, own_views, _) in zip(there[step], here[step], strict=True):
            assert ids.tolist() == own_ids.tolist()
            assert views.tobytes() == own_views.tobytes()
            assert rejected == ()
