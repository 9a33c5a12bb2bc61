"""Listing, indexing and packing on a real S3 server, by requests that are counted."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simclr_ray import storage
from simclr_ray.data import open_shards
from simclr_ray.data.index import IndexOptions, index
from simclr_ray.data.listing import list_folder
from simclr_ray.data.pack import pack
from tests.conftest import all_rows
from tests.integration import sources
from tests.integration.test_index import stored

pytestmark = pytest.mark.integration

UNIT = 8


@pytest.fixture
def tars(s3_folder: str, tmp_path: Path) -> str:
    """100 images in two tars of a bucket."""
    for path in sorted(sources.tars(tmp_path / "tars", sources.rows(100), each=50).iterdir()):
        storage.write_bytes(f"{s3_folder}/tars/{path.name}", path.read_bytes())
    return f"{s3_folder}/tars"


def test_tars_of_a_bucket_are_indexed_and_packed(local_ray: None, tars: str, s3_folder: str) -> None:
    images = sources.rows(100)
    report = index(tars, f"{s3_folder}/index", IndexOptions(unit_rows=UNIT))
    assert stored(report.manifest) == Counter(row.image for row in images)
    for number, shard in enumerate(report.manifest.shards):
        assert shard.version == shard.digest == storage.stat(report.manifest.shard_uri(number)).version
    packed = pack(tars, f"{s3_folder}/packed", labels="stored", unit_rows=UNIT, shard_bytes=20_000)
    rows = all_rows(packed.manifest)
    assert Counter((row["image"], row["label"]) for row in rows) == Counter((row.image, row.label) for row in images)
    left = {
        uri.removeprefix(f"{s3_folder}/packed/").partition("-")[0]
        for uri, _ in storage.list_files(f"{s3_folder}/packed")
    }
    assert left == {"manifest.parquet", "shard"}
    again = pack(tars, f"{s3_folder}/again", labels="stored", unit_rows=UNIT, shard_bytes=20_000)
    assert again.manifest.fingerprint == packed.manifest.fingerprint


def test_loose_objects_of_a_bucket_are_indexed_with_their_versions(local_ray: None, s3_folder: str) -> None:
    images = sources.rows(30)
    for number, row in enumerate(images):
        storage.write_bytes(f"{s3_folder}/loose/{number % 3}/{number}.png", row.image)
    report = index(f"{s3_folder}/loose", f"{s3_folder}/index", IndexOptions(labels="folder", unit_rows=UNIT))
    assert stored(report.manifest) == Counter(row.image for row in images)
    assert report.manifest.classes == ("0", "1", "2")


def test_a_listing_costs_a_page_for_1000_keys(s3_folder: str, tmp_path: Path) -> None:
    """3 folders of 700 keys: one page each, and no more than three requests to look at the top."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_bytes(f"{s3_folder}/{i % 3}/{i:04d}.jpg", b"x"), range(2100)))
    before = storage.counters().requests
    found = list_folder(s3_folder, str(tmp_path / "work"), threads=8)
    requests = storage.counters().requests - before
    assert found.rows == 2100
    assert [part.pages for part in found.parts] == [1, 1, 1]
    local = 2 * (1 + 2 * 3)  # the parts and their notes, and looking for them
    assert requests <= 3 + 3 * 2 + local, "top: page and level; each folder: looked at, then listed"
    before = storage.counters().requests
    list_folder(s3_folder, str(tmp_path / "work"), threads=8)
    assert storage.counters().requests - before <= 1 + 3, "it is in the working folder"


def test_a_tar_of_large_members_is_indexed_by_its_headers(s3_folder: str, tmp_path: Path) -> None:
    sources.write_tar(tmp_path / "large.tar", [(f"{number}.jpg", bytes(4 << 20)) for number in range(8)])
    storage.write_bytes(f"{s3_folder}/large.tar", (tmp_path / "large.tar").read_bytes())
    found = open_shards.open_shard(f"{s3_folder}/large.tar", kind="tar", unit_rows=UNIT)
    assert found.rows == 8
    assert found.read <= 10 * (64 << 10)
    assert found.requests <= 10
