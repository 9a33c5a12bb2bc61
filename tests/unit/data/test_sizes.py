"""What images weigh before they are read, and what that bounds: shards, reading ahead, a task's memory."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.data import inputs, pack, sources, stream
from simclr_ray.data.decode import Limits
from simclr_ray.data.index import IndexOptions, index
from simclr_ray.data.inputs import Columns, columns_of, read_inputs
from simclr_ray.data.listing import SCHEMA
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.pack_order import PackOrder
from simclr_ray.data.plan import Plan, Segment, UnitTable
from simclr_ray.data.read import IMAGE_BYTES, RowRange, object_bytes, resolve
from simclr_ray.data.shards import ImageRow
from simclr_ray.data.sizes import SAMPLES, Sizes, reads_of_a_byte
from simclr_ray.data.stream import PlanAddress, read_tasks
from tests.conftest import all_rows, make_data_set, real_rows
from tests.unit.data.kinds import as_objects, as_parquet, as_tar

UNIT = 16


def entries(uris: list[str], sizes: list[int | None]) -> pa.Table:
    none = [None] * len(uris)
    return pa.table({"uri": uris, "bytes": sizes, "version": none, "label": none}, schema=SCHEMA)


# --- the mean of loose images ---------------------------------------------------------------------------------------


def test_sizes_that_are_listed_are_not_asked_for() -> None:
    sizes = Sizes(3)
    table = entries(["/absent/a.png", "/absent/b.png"], [10, 21])
    assert sizes.seen(table) is table
    sizes.seen(entries(["/absent/c.png"], [30]))
    assert sizes.mean() == 61 // 3


def test_sizes_that_are_not_listed_are_those_of_a_sample_from_all_over_the_list(tmp_path: Path) -> None:
    """The second half is ten times as large: a sample of the beginning would be far off."""
    (tmp_path / "small.jpg").write_bytes(bytes(100))
    (tmp_path / "large.jpg").write_bytes(bytes(1000))
    half = 50 * SAMPLES
    sizes = Sizes(2 * half)
    for name in ("small", "large"):
        for part in (half // 3, half // 3, half - 2 * (half // 3)):
            sizes.seen(entries([f"{tmp_path}/{name}.jpg"] * part, [None] * part))
    assert SAMPLES <= len(sizes._unknown) <= SAMPLES + 1
    assert 540 <= (sizes.mean() or 0) <= 560


def test_images_that_are_gone_say_nothing_of_their_size(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(bytes(100))
    sizes = Sizes(2)
    sizes.seen(entries([f"{tmp_path}/a.jpg", f"{tmp_path}/gone.jpg"], [None, None]))
    assert sizes.mean() == 100
    nothing = Sizes(1)
    nothing.seen(entries([f"{tmp_path}/gone.jpg"], [None]))
    assert nothing.mean() is None
    assert Sizes(0).mean() is None


@pytest.mark.parametrize("listed", [True, False], ids=["a folder", "a list"])
def test_an_index_of_loose_images_knows_their_mean_and_plans_with_it(tmp_path: Path, listed: bool) -> None:
    images = real_rows(40)
    (tmp_path / "images").mkdir()
    for number, row in enumerate(images):
        (tmp_path / "images" / f"{number}.png").write_bytes(row.image)
    (tmp_path / "list.txt").write_text("".join(f"images/{number}.png\n" for number in range(40)))
    (tmp_path / "images" / "large.tar").write_bytes(bytes(1 << 20))
    source = tmp_path / "images" if listed else tmp_path / "list.txt"
    kind = "objects" if listed else None
    manifest = index(str(source), str(tmp_path / "index"), IndexOptions(kind=kind, unit_rows=UNIT)).manifest
    mean = sum(len(row.image) for row in images) // 40
    assert manifest.source[IMAGE_BYTES] == object_bytes(manifest) == mean, "tars beside them do not count"
    piece = UnitTable(manifest).pieces(0)[0]
    assert resolve(manifest, piece).bytes_about == UNIT * mean
    assert pack._rows_per_shard(manifest, 3 * UNIT * mean, UNIT, None) == 3 * UNIT


def test_indexes_of_before_know_the_mean_by_their_totals() -> None:
    manifest = Manifest("x", (), source={"bytes": 1000, "files": 4})
    assert object_bytes(manifest) == 250
    assert object_bytes(replace(manifest, source={})) == object_bytes(replace(manifest, source={"bytes": 0})) > 1


# --- how often a stored byte is read --------------------------------------------------------------------------------


def test_units_inside_large_row_groups_read_them_again_and_again(tmp_path: Path) -> None:
    def times(*groups: int) -> float:
        path = tmp_path / "set"
        shard = replace(as_parquet(str(path), real_rows(2)).shards[0], rows_per_group=groups)
        return reads_of_a_byte(Manifest(str(path), (shard,), unit_rows=64))

    assert times(64, 64, 10) == 1.0
    assert times(1024) == 16.0
    assert times(1000) == 16.0, "15 units of its own, and the rest in one that is shared"
    assert times(128, 64) == pytest.approx((128 * 2 + 64) / 192)
    assert reads_of_a_byte(Manifest(str(tmp_path), ())) == 1.0
    assert reads_of_a_byte(as_tar(str(tmp_path / "tar"), real_rows(50))) == 1.0


# --- packing within bounds ------------------------------------------------------------------------------------------


def rewrite(folder: Path, most_bytes: int, columns: Columns) -> pack._Rewrite:
    return pack._Rewrite(str(folder), UNIT, Limits(), None, columns, 7, 3, most_bytes)


def test_a_task_ends_its_shard_where_images_are_larger_than_thought(tmp_path: Path) -> None:
    manifest = make_data_set(tmp_path / "set", real_rows(200), unit_rows=UNIT)
    ranges = [resolve(manifest, piece) for piece in PackOrder(manifest, 200, seed=None).pieces(0)]
    columns = columns_of(manifest, "label")
    whole = pack.pack_one(1, ranges, [], rewrite(tmp_path / "whole", 1 << 30, columns))
    assert [shard["uri"] for shard in whole["shards"]] == ["shard-00001.parquet"]
    cut = pack.pack_one(1, ranges, [5], rewrite(tmp_path / "cut", 20_000, columns))
    parts = cut["shards"]
    assert [shard["uri"] for shard in parts] == [f"shard-{1 + 3 * part:05d}.parquet" for part in range(len(parts))]
    assert len(parts) > 2
    rows = [sum(shard["rows_per_group"]) for shard in parts]
    assert all(count % UNIT == 0 for count in rows[:-1]), "so that no unit is torn"
    assert sum(rows) == 199
    largest_unit = UNIT * max(len(row.image) for row in real_rows(200))
    assert all(shard["bytes"] < 20_000 + 2 * largest_unit for shard in parts)
    manifests = [
        Manifest(str(tmp_path / name), [pack.Shard(**shard) for shard in note["shards"]], unit_rows=UNIT)
        for name, note in (("whole", whole), ("cut", cut))
    ]
    stored = [sorted((str(row["uri"]), row["image"]) for row in all_rows(one)) for one in manifests]
    assert len(stored[0]) == 200
    assert [row for row in stored[0] if row in stored[1]] == stored[1]
    assert cut["largest"] == whole["largest"] == 9


def test_inputs_are_read_ahead_within_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = as_objects(str(tmp_path / "set"), real_rows(160))
    ranges = [resolve(manifest, piece) for piece in PackOrder(manifest, 160, seed=None).pieces(0)]
    assert len(ranges) == 12
    begun: list[RowRange] = []
    real = inputs.read_range

    def read(where: RowRange, *rest: object) -> pa.Table:
        begun.append(where)
        return real(where, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inputs, "read_range", read)
    monkeypatch.setattr(inputs, "BYTES_AHEAD", ranges[0].bytes_about + ranges[1].bytes_about)
    rows = read_inputs(ranges, columns_of(manifest, None))
    first = next(rows)
    assert (first.sample_id, first.image) == (0, real_rows(1)[0].image)
    assert begun == ranges[:2]
    assert [row.sample_id for row in rows] == list(range(1, 160))


def test_a_list_of_parquet_is_read_twice_for_an_index_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for what its lines are, once for the lines."""
    for number, row in enumerate(real_rows(6)):
        (tmp_path / f"{number}.png").write_bytes(row.image)
    uris = [f"{number}.png" for number in range(6)]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "list.parquet", row_group_size=2)
    groups = []
    real = sources._listed

    def listed(source: str, lines: list[tuple[str, None]]) -> pa.Table:
        groups.append(lines)
        return real(source, lines)

    monkeypatch.setattr(sources, "_listed", listed)
    report = index(str(tmp_path / "list.parquet"), str(tmp_path / "index"), IndexOptions(unit_rows=2))
    assert report.manifest.rows == 6
    assert len(groups) == 2 * 3


# --- the coordinator ------------------------------------------------------------------------------------------------


def test_the_tasks_of_a_segment_are_gone_before_the_next_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[ImageRow] = real_rows(160)
    manifest = as_parquet(str(tmp_path / "set"), rows)
    address = PlanAddress(manifest.folder, manifest.fingerprint, 3)
    first = read_tasks(address, Segment(0, 0, 8, 8), 2)
    assert read_tasks(address, Segment(0, 0, 8, 8), 2) is first, "asked for again, not made again"
    held = weakref.ref(first[0])
    del first
    gc.collect()
    assert held() is not None
    seen = []
    real = stream.plan_tasks

    def watched(*arguments: object) -> object:
        gc.collect()
        seen.append(held())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "plan_tasks", watched)
    following = read_tasks(address, Segment(8, 8, 16, 16), 2)
    assert seen == [None]
    (table,) = list(following[0]())[:1]
    planned = Plan(UnitTable(manifest), 3).unit(8)
    assert set(table["unit"].to_pylist()) == {planned.index}
