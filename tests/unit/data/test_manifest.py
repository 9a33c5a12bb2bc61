"""The manifest: what is written comes back, and whatever is not ours is refused in a sentence."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray import storage
from simclr_ray.data import read_objects
from simclr_ray.data.manifest import (
    FEWEST_UNITS,
    FORMAT,
    KINDS,
    MANIFEST_NAME,
    Manifest,
    Shard,
    read_manifest,
    unit_rows_for,
    write_manifest,
)
from simclr_ray.data.ranges import Source
from simclr_ray.errors import DataError
from tests.conftest import FASHION

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
GROUPS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)
OFFSETS = st.lists(st.integers(0, 2**62), max_size=4).map(tuple)
SHARDS = st.builds(
    Shard, uri=TEXT, kind=st.sampled_from(KINDS), digest=TEXT, bytes=st.integers(0, 2**62), rows_per_group=GROUPS,
    offsets=OFFSETS, version=st.none() | TEXT,
)  # fmt: skip
MANIFESTS = st.builds(
    Manifest,
    folder=st.just(""),
    shards=st.lists(SHARDS, max_size=5).map(tuple),
    unit_rows=st.integers(1, 2**31),
    image_column=TEXT,
    classes=st.lists(TEXT, max_size=4).map(tuple),
    source=st.dictionaries(TEXT, st.none() | st.integers() | TEXT, max_size=3),
)


def two_shards(folder: str = "/data") -> Manifest:
    shards = (
        Shard("a.parquet", "parquet", "0a", 100, (16, 4), (50,), "v1"),
        Shard("b.parquet", "parquet", "0b", 90, (16,), (40,), "v2"),
    )
    return Manifest(folder, shards, unit_rows=16, classes=("cat", "dog"), source={"licence": "MIT"})


@settings(deadline=None, max_examples=50)
@given(manifest=MANIFESTS)
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = replace(manifest, folder=folder)
        uri = write_manifest(written)
        assert read_manifest(folder) == written
        assert read_manifest(uri) == written, "the manifest's own URI names the data set too"
        assert [path.name for path in Path(folder).iterdir()] == [MANIFEST_NAME], "nothing else is left behind"


@settings(deadline=None, max_examples=50)
@given(manifest=MANIFESTS)
def test_sample_ids_count_the_rows_before_a_shard(manifest: Manifest) -> None:
    ids = manifest.first_sample_ids()
    assert len(ids) == len(manifest.shards)
    for index, first in enumerate(ids.tolist()):
        assert first == sum(shard.rows for shard in manifest.shards[:index])
    assert manifest.rows == sum(sum(shard.rows_per_group) for shard in manifest.shards)


@pytest.mark.parametrize(
    "change",
    [
        {"uri": "c.parquet"},
        {"kind": "tar"},
        {"digest": "0c"},
        {"bytes": 101},
        {"offsets": (51,)},
        {"offsets": ()},
        {"rows_per_group": (4, 16)},
        {"rows_per_group": (20,)},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_every_field_of_a_shard(change: dict[str, Any]) -> None:
    manifest = two_shards()
    first, second = manifest.shards
    assert replace(manifest, shards=(replace(first, **change), second)).fingerprint != manifest.fingerprint


@pytest.mark.parametrize("change", [{"unit_rows": 8}, {"image_column": "jpg"}], ids=str)
def test_the_fingerprint_changes_with_what_decides_the_samples(change: dict[str, Any]) -> None:
    manifest = two_shards()
    assert replace(manifest, **change).fingerprint != manifest.fingerprint


def test_the_fingerprint_changes_with_the_order_and_number_of_shards() -> None:
    manifest = two_shards()
    others = {replace(manifest, shards=shards).fingerprint for shards in (manifest.shards[::-1], manifest.shards[:1])}
    assert len(others | {manifest.fingerprint}) == 3


@pytest.mark.parametrize("change", [{"folder": "s3://bucket/elsewhere"}, {"classes": ()}, {"source": {}}], ids=str)
def test_the_fingerprint_does_not_depend_on_the_place_or_on_words_about_it(change: dict[str, Any]) -> None:
    manifest = two_shards()
    assert replace(manifest, **change).fingerprint == manifest.fingerprint


def test_a_data_set_may_be_moved(tmp_path: Path) -> None:
    before = two_shards(str(tmp_path / "before"))
    write_manifest(before)
    (tmp_path / "before").rename(tmp_path / "after")
    after = read_manifest(str(tmp_path / "after"))
    assert after.fingerprint == before.fingerprint
    assert after.shard_uri(0) == str(tmp_path / "after" / "a.parquet")


def test_a_shard_with_a_full_uri_stays_where_it_is() -> None:
    shards = (Shard("s3://other/a.parquet", "parquet", "0a", 1, (1,)), Shard("/abs/b", "parquet", "0b", 1, (1,)))
    manifest = Manifest("/data", shards)
    assert [manifest.shard_uri(i) for i in (0, 1)] == ["s3://other/a.parquet", "/abs/b"]


@pytest.mark.parametrize("named", ["/etc/passwd", "file:///etc/passwd", "s3://other/shard.parquet", "shard.parquet"])
def test_a_manifest_found_in_a_store_names_no_file_of_this_machine(named: str) -> None:
    """It may be by anybody who can write there; one that was made here for a pack may."""
    shards = (Shard(named, "objects", "", 10, (1,)),)
    assert Manifest("s3://bucket/set", shards).shard_uri(0) == storage.join("s3://bucket/set", named)
    found = Manifest("s3://bucket/set", shards, ours=False)
    listed = {"uri": named, "bytes": 3, "version": None}
    if named.startswith(("/", "file:")):
        with pytest.raises(DataError, match="may not name files of the machines"):
            found.shard_uri(0)
        with pytest.raises(DataError, match="may not name files of the machines"):
            read_objects._source(listed, Source("s3://bucket/set/list.parquet", "objects", 10, "v", ours=False))
    else:
        assert found.shard_uri(0) == storage.join("s3://bucket/set", named)
        read_objects._source(listed, Source("s3://bucket/set/list.parquet", "objects", 10, "v", ours=False))


def test_a_missing_manifest_is_a_sentence_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set here") as caught:
        read_manifest(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert "simclr-ray pack" in str(caught.value)


def edited(manifest: Manifest, edit: Callable[[dict[str, Any], pa.Table], tuple[Any, pa.Table]]) -> bytes:
    """The bytes of a manifest whose header or table a stranger has changed."""
    data = Path(write_manifest(manifest)).read_bytes()
    table = pq.read_table(io.BytesIO(data))
    header, table = edit(json.loads(table.schema.metadata[b"simclr_ray"]), table)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"simclr_ray": json.dumps(header)}), buffer)
    return buffer.getvalue()


def set_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    kind = table.schema.field(index).type
    kind = pa.list_(kind.value_type) if pa.types.is_list(kind) else kind  # whose elements may be null
    return table.set_column(index, pa.field(name, kind), pa.array(values, kind))


@pytest.mark.parametrize(
    "edit",
    [
        lambda header, table: (header, set_column(table, "digest", ["0a", "ff"])),
        lambda header, table: (header, set_column(table, "rows_per_group", [[16, 5], [16]])),
        lambda header, table: (header, table.slice(1)),
        lambda header, table: (header | {"unit_rows": 8}, table),
        lambda header, table: (header | {"fingerprint": "0" * 32}, table),
    ],
    ids=["digest", "rows", "shard taken out", "unit size", "fingerprint"],
)
def test_a_tampered_manifest_is_refused(tmp_path: Path, edit: Callable[..., Any]) -> None:
    file = tmp_path / MANIFEST_NAME
    file.write_bytes(edited(two_shards(str(tmp_path)), edit))
    with pytest.raises(DataError, match="does not match its own fingerprint") as caught:
        read_manifest(str(tmp_path))
    assert str(file) in str(caught.value)


def in_format_1(folder: Path, manifest: Manifest) -> None:
    """As version 0.1.0 wrote it: digests called etag, no versions and offsets, and a hash of JSON."""
    columns = manifest.table.as_arrow().select(["uri", "kind", "digest", "bytes", "rows_per_group"])
    shards = [[s.uri, s.kind, s.digest, s.bytes, list(s.rows_per_group)] for s in manifest.shards]
    identity = [[1, manifest.unit_rows, manifest.image_column], shards]
    header = {
        "format": 1, "unit_rows": manifest.unit_rows, "image_column": manifest.image_column,
        "classes": list(manifest.classes), "source": dict(manifest.source),
        "fingerprint": storage.digest(json.dumps(identity, separators=(",", ":")).encode()),
    }  # fmt: skip
    table = columns.rename_columns(["uri", "kind", "etag", "bytes", "rows_per_group"])
    pq.write_table(table.replace_schema_metadata({"simclr_ray": json.dumps(header)}), folder / MANIFEST_NAME)


def test_a_manifest_of_format_1_is_read(tmp_path: Path) -> None:
    bare = [replace(shard, offsets=(), version=None) for shard in two_shards().shards]
    manifest = replace(two_shards(str(tmp_path)), shards=bare)
    in_format_1(tmp_path, manifest)
    assert read_manifest(str(tmp_path)) == manifest
    assert read_manifest(str(FASHION / "train")).rows == 16_384, "the data set that comes with the clone"


def test_a_tampered_manifest_of_format_1_is_refused(tmp_path: Path) -> None:
    in_format_1(tmp_path, two_shards(str(tmp_path)))
    file = tmp_path / MANIFEST_NAME
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)
    with pytest.raises(DataError, match="does not match its own fingerprint"):
        read_manifest(str(tmp_path))


def test_a_manifest_of_many_row_groups_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards with no groups or offsets are among those at the seams."""
    monkeypatch.setattr("simclr_ray.data.manifest._SHARDS_AT_ONCE", 2)
    shards = [
        Shard(f"{i}.tar", "tar", f"d{i}", i, (i,) * (i % 3), tuple(range(i % 4)), None if i % 2 else f"v{i}")
        for i in range(11)
    ]
    manifest = Manifest(str(tmp_path), shards)
    assert pq.ParquetFile(write_manifest(manifest)).num_row_groups == 6
    read = read_manifest(str(tmp_path))
    assert list(read.shards) == shards
    assert read.fingerprint == manifest.fingerprint
    assert read.first_sample_ids().tolist() == manifest.first_sample_ids().tolist()


def test_a_data_set_knows_where_it_was_written(tmp_path: Path) -> None:
    write_manifest(two_shards(str(tmp_path / "before")))
    (tmp_path / "before").rename(tmp_path / "after")
    home, copy = two_shards(), read_manifest(str(tmp_path / "after"))
    assert copy.home == str(tmp_path / "before")
    assert [home.shard_version(i) for i in (0, 1)] == ["v1", "v2"]
    assert [copy.shard_version(i) for i in (0, 1)] == [None, None], "the copies have versions of their own"


def test_the_fingerprint_is_pinned() -> None:
    """A run refuses to go on over another fingerprint, so its bytes must not change with a library or a machine."""
    assert two_shards().fingerprint == "ce618553b3520d040387bc8995d4a63b"


def test_shards_behave_as_a_sequence() -> None:
    table, shards = two_shards().shards, list(two_shards().shards)
    assert (len(table), table[-1], table[::-1]) == (2, shards[1], tuple(shards[::-1]))
    assert shards[0] in table
    with pytest.raises(IndexError):
        table[2]
    assert Manifest("/x", ()).rows == 0


def test_a_manifest_of_a_newer_version_is_refused_as_such(tmp_path: Path) -> None:
    data = edited(two_shards(str(tmp_path)), lambda header, table: ({"format": FORMAT + 1, "unlike": "ours"}, table))
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(DataError, match=r"written by a newer version.*format 3"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    "edit",
    [
        lambda header, table: ({}, table),
        lambda header, table: ([1, 2], table),
        lambda header, table: (header | {"format": "one"}, table),
        lambda header, table: ({k: v for k, v in header.items() if k != "unit_rows"}, table),
        lambda header, table: (header | {"classes": None}, table),
        lambda header, table: (header, table.drop_columns("digest")),
        lambda header, table: (header, set_column(table, "rows_per_group", [None, None])),
        lambda header, table: (header, set_column(table, "rows_per_group", [[None], [16]])),
        lambda header, table: (header, set_column(table, "uri", [None, "b"])),
    ],
    ids=["empty header", "list header", "format", "no unit_rows", "classes", "no digest", "no rows", "null row", "uri"],
)
def test_a_header_or_table_of_another_shape_is_refused_in_a_sentence(tmp_path: Path, edit: Callable[..., Any]) -> None:
    file = tmp_path / MANIFEST_NAME
    file.write_bytes(edited(two_shards(str(tmp_path)), edit))
    with pytest.raises(DataError) as caught:
        read_manifest(str(tmp_path))
    assert str(file) in str(caught.value)


def parquet_of_someone_else() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"uri": ["a"], "caption": ["a cat"]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"not parquet", b"PAR1" + b"\x00" * 40 + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1", parquet_of_someone_else()],
    ids=["empty", "text", "no footer", "absurd footer", "foreign table"],
)
def test_a_foreign_file_is_refused_in_a_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(DataError, match="not a manifest of this project") as caught:
        read_manifest(str(tmp_path))
    assert str(tmp_path / MANIFEST_NAME) in str(caught.value)


@settings(deadline=None, max_examples=50)
@given(cut=st.integers(0, 10_000), flip=st.integers(0, 10_000))
def test_no_damage_to_the_file_raises_anything_else(cut: int, flip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = two_shards(folder)
        file = Path(write_manifest(manifest))
        data = bytearray(file.read_bytes())
        data[flip % len(data)] ^= 0xFF
        file.write_bytes(data[: len(data) - cut % len(data)] if cut % 2 else data)
        try:
            read = read_manifest(folder)
        except DataError:
            return
        assert read.fingerprint == manifest.fingerprint, "damage that is not seen does not touch the samples"


@given(st.integers(1, 100_000))
def test_a_small_data_set_has_units_enough_to_shuffle(rows: int) -> None:
    """A power of two up to 64, the largest that gives an epoch its 256 units; one row where none does."""
    unit_rows = unit_rows_for(rows)
    assert unit_rows in (1, 2, 4, 8, 16, 32, 64)
    assert unit_rows == 1 or rows // unit_rows >= FEWEST_UNITS
    assert unit_rows == 64 or rows // (2 * unit_rows) < FEWEST_UNITS
