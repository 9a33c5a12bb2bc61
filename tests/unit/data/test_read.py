"""Reading rows: the rows that a piece names, or a sentence that names the shard."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece, UnitTable
from simclr_ray.data.read import read_rows
from simclr_ray.data.shards import ImageRow
from simclr_ray.errors import DataError
from tests.conftest import make_data_set, real_rows

COLUMNS = ["image", "label", "uri"]


@pytest.fixture(scope="module")
def rows() -> list[ImageRow]:
    return real_rows(90)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, rows: list[ImageRow]) -> Manifest:
    """Three shards of 40, 40 and 10 rows in groups of 16."""
    return make_data_set(tmp_path_factory.mktemp("packed"), rows, shard_rows=40)


@pytest.fixture
def broken(tmp_path: Path, rows: list[ImageRow]) -> Manifest:
    """A data set of this test's own, to be spoiled."""
    return make_data_set(tmp_path / "spoiled", rows[:40], shard_rows=20)


def as_rows(table: pa.Table) -> list[ImageRow]:
    return [ImageRow(row["image"], row["label"], row["uri"]) for row in table.to_pylist()]


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_pieces_give_their_rows_in_order_with_their_ids(
    packed: Manifest, rows: list[ImageRow], data: st.DataObject
) -> None:
    pieces, wanted = [], []
    firsts = packed.first_sample_ids().tolist()
    for _ in range(data.draw(st.integers(1, 4))):
        shard = data.draw(st.integers(0, 2))
        groups = packed.shards[shard].rows_per_group
        group = data.draw(st.integers(0, len(groups) - 1))
        start = data.draw(st.integers(0, groups[group] - 1))
        stop = data.draw(st.integers(start + 1, groups[group]))
        first = firsts[shard] + sum(groups[:group]) + start
        pieces.append(Piece(shard, group, start, stop, first))
        wanted += range(first, first + stop - start)
    table = read_rows(packed, pieces, COLUMNS)
    assert table.column("sample_id").to_pylist() == wanted
    assert as_rows(table) == [rows[i] for i in wanted]


def test_the_units_together_are_the_data_set(packed: Manifest, rows: list[ImageRow]) -> None:
    """90 rows make 5 units of 16, two of them shared by several groups, and 10 rows that fill no unit."""
    units = UnitTable(packed)
    read: dict[int, ImageRow] = {}
    for unit in range(units.num_units):
        table = read_rows(packed, units.pieces(unit), COLUMNS)
        assert len(table) == packed.unit_rows
        ids = table.column("sample_id").to_pylist()
        assert read.keys().isdisjoint(ids)
        read |= dict(zip(ids, as_rows(table), strict=True))
    assert len(read) == len(rows) - units.rows_left_out
    assert all(row == rows[i] for i, row in read.items())


def test_only_the_columns_asked_for_are_read(packed: Manifest) -> None:
    assert read_rows(packed, [Piece(0, 0, 0, 4, 0)], ["label"]).column_names == ["label", "sample_id"]


def test_a_missing_shard_is_named(broken: Manifest) -> None:
    Path(broken.shard_uri(1)).unlink()
    assert len(read_rows(broken, [Piece(0, 0, 0, 16, 0)], COLUMNS)) == 16, "the others can be read"
    with pytest.raises(DataError, match="shard is gone") as caught:
        read_rows(broken, [Piece(1, 0, 0, 16, 20)], COLUMNS)
    assert broken.shard_uri(1) in str(caught.value)


def spoil(change: Callable[[bytes], bytes], manifest: Manifest) -> str:
    shard = Path(manifest.shard_uri(1))
    shard.write_bytes(change(shard.read_bytes()))
    return str(shard)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"\x00" * len(data),
        lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda data: b"<html>no longer here</html>",
    ],
    ids=["empty", "half", "one byte short", "zeros", "absurd footer", "a web page"],
)
def test_a_truncated_or_foreign_shard_is_named(broken: Manifest, change: Callable[[bytes], bytes]) -> None:
    uri = spoil(change, broken)
    with pytest.raises(DataError) as caught:
        read_rows(broken, [Piece(1, 0, 0, 16, 20)], COLUMNS)
    assert uri in str(caught.value)


def test_damage_inside_a_row_group_is_a_sentence_too(broken: Manifest) -> None:
    """The footer is whole; the page headers of the rows are not."""
    uri = spoil(lambda data: b"PAR1" + b"\xff" * 600 + data[604:], broken)
    with pytest.raises(DataError) as caught:
        read_rows(broken, [Piece(1, 0, 0, 16, 20)], COLUMNS)
    assert uri in str(caught.value)


def test_a_missing_column_is_named_with_what_there_is(packed: Manifest) -> None:
    with pytest.raises(DataError, match='no column "jpg"') as caught:
        read_rows(packed, [Piece(2, 0, 0, 10, 80)], ["image", "jpg"])
    assert packed.shard_uri(2) in str(caught.value)
    assert "image, label, uri" in str(caught.value)


def regrouped(data: bytes, size: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(data)), buffer, row_group_size=size)
    return buffer.getvalue()


@pytest.mark.parametrize(("size", "group"), [(8, 0), (20, 0), (20, 1)])
def test_row_groups_that_changed_are_seen(broken: Manifest, size: int, group: int) -> None:
    """Group 1 of a shard that is rewritten as one group does not exist any more."""
    uri = spoil(lambda data: regrouped(data, size), broken)
    rows = broken.shards[1].rows_per_group[group]
    with pytest.raises(DataError) as caught:
        read_rows(broken, [Piece(1, group, 0, rows, 20)], COLUMNS)
    assert uri in str(caught.value)


def test_row_groups_that_changed_are_seen_where_the_size_is_the_same(broken: Manifest) -> None:
    uri = spoil(lambda data: regrouped(data, 8), broken)
    shard = replace(broken.shards[1], bytes=Path(uri).stat().st_size)
    with pytest.raises(DataError, match=r"row group 0 changed.*got 8 rows.*expected 16") as caught:
        read_rows(replace(broken, shards=(broken.shards[0], shard)), [Piece(1, 0, 0, 16, 20)], COLUMNS)
    assert uri in str(caught.value)


def test_a_shard_rewritten_with_other_images_is_seen(tmp_path: Path) -> None:
    """Same number of rows and groups; only its size differs, which is known without reading it."""
    rows = real_rows(40)
    manifest = make_data_set(tmp_path / "a", rows[:20])
    other = make_data_set(tmp_path / "b", rows[20:])
    Path(manifest.shard_uri(0)).write_bytes(Path(other.shard_uri(0)).read_bytes())
    with pytest.raises(DataError, match="changed since the manifest was written") as caught:
        read_rows(manifest, [Piece(0, 0, 0, 16, 0)], COLUMNS)
    assert manifest.shard_uri(0) in str(caught.value)
