"""Units on their way: tasks know all they need, reading ahead keeps the order, and lost units have stand-ins."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data import units
from simclr_ray.data.decode import REASONS, Limits
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.plan import Plan, UnitTable, stand_ins
from simclr_ray.data.shards import ImageRow
from simclr_ray.data.units import TaskPlan, plan_tasks, read_ahead, read_planned, read_task
from simclr_ray.errors import DataError
from tests.conftest import FASHION, make_data_set, real_rows
from tests.unit.data.kinds import as_objects, as_parquet, as_tar

R, SEED = 16, 3


@pytest.fixture(scope="module")
def rows() -> list[ImageRow]:
    return real_rows(160)


@pytest.fixture
def manifest(tmp_path: Path, rows: list[ImageRow]) -> Manifest:
    """160 images: shards of 40 in groups of 16, so 8 units of one group and 2 of the remainders of four."""
    return as_parquet(str(tmp_path / "set"), rows)


def plan_of(manifest: Manifest) -> Plan:
    return Plan(UnitTable(manifest), SEED)


def tasks_of(manifest: Manifest, start: int, stop: int, units_per_task: int) -> list[TaskPlan]:
    return plan_tasks(manifest, plan_of(manifest), start, stop, units_per_task)


def read_all(tasks: list[TaskPlan]) -> list[pa.Table]:
    return [table for task in tasks for table in read_task(task)]


def lose(manifest: Manifest, shard: int) -> None:
    Path(manifest.shard_uri(shard)).unlink()


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_tasks_read_the_plans_units_in_order_over_epochs(manifest: Manifest, rows: list[ImageRow]) -> None:
    plan = plan_of(manifest)
    tables = read_all(tasks_of(manifest, 7, 24, 3))
    assert len(tables) == 17
    for index, table in enumerate(tables, start=7):
        planned = plan.unit(index)
        stored = [i for p in planned.pieces for i in range(p.first_sample_id, p.first_sample_id + p.stop - p.start)]
        ids = [stored[i] for i in planned.order]
        assert table["sample_id"].to_pylist() == ids
        assert table["image"].to_pylist() == [rows[i].image for i in ids]
        assert set(table["unit"].to_pylist()) == {index}
        assert set(table["epoch"].to_pylist()) == {index // 10}
        assert table["use"].to_pylist() == [0] * R
        assert table["lost_id"].to_pylist() == table["lost_reason"].to_pylist() == [-1] * R


def test_a_task_needs_no_manifest(manifest: Manifest) -> None:
    tasks = tasks_of(manifest, 0, 10, 4)
    whole = read_all(tasks)
    Path(manifest.folder, "manifest.parquet").unlink()
    assert read_all(pickle.loads(pickle.dumps(tasks))) == whole


def test_a_task_does_not_grow_with_the_data_set(manifest: Manifest, rows: list[ImageRow], tmp_path: Path) -> None:
    larger = make_data_set(tmp_path / "larger", rows * 20, unit_rows=R, shard_rows=160)
    sizes = [max(len(pickle.dumps(task)) for task in tasks_of(m, 0, 10, 1)) for m in (manifest, larger)]
    assert sizes[1] <= sizes[0] < 10_000


# --- lost units -----------------------------------------------------------------------------------------------------


def test_a_lost_unit_is_replaced_by_the_next_of_its_epoch_in_views_of_its_own(manifest: Manifest) -> None:
    plan = plan_of(manifest)
    whole = read_all(tasks_of(manifest, 0, 20, 3))
    lose(manifest, 2)
    lost = {j for j in range(20) if {piece.shard for piece in plan.unit(j).pieces} == {2}}
    assert len(lost) == 4, "two units of one group, in two epochs"
    for index, table in enumerate(read_all(tasks_of(manifest, 0, 20, 3))):
        if index not in lost:
            continue
        distance, other = next((d, o) for d, o in enumerate(stand_ins(index, 10), start=1) if o not in lost)
        assert set(table["use"].to_pylist()) == {distance * R}
        assert set(table["unit"].to_pylist()) == {index}, "it stands at the place of the lost one"
        assert table["lost_id"].to_pylist() == whole[index]["sample_id"].to_pylist()
        assert {REASONS[code] for code in table["lost_reason"].to_pylist()} == {"shard_missing"}
        kept = [row is not None for row in table["image"].to_pylist()]
        assert any(kept)
        assert table["sample_id"].to_pylist() == whole[other]["sample_id"].to_pylist()
        assert set(table["epoch"].to_pylist()) == {index // 10}


def test_what_stands_in_does_not_depend_on_how_units_fall_on_tasks(manifest: Manifest) -> None:
    """Nor, so, on the number of workers or on where a run was resumed."""
    lose(manifest, 2)
    whole = read_all(tasks_of(manifest, 0, 20, 20))
    assert read_all(tasks_of(manifest, 0, 20, 1)) == whole
    assert read_all(tasks_of(manifest, 0, 7, 3)) + read_all(tasks_of(manifest, 7, 20, 4)) == whole


def test_no_unit_is_used_twice_at_the_same_address(manifest: Manifest) -> None:
    """(epoch, sample, view) names a view; two rows of one would be two equal views, and negatives of each other."""
    for shard in (0, 2, 3):
        lose(manifest, shard)
    seen: set[tuple[int, int, int]] = set()
    for table in read_all(tasks_of(manifest, 0, 20, 5)):
        images = zip(*(table[name].to_pylist() for name in ("epoch", "sample_id", "use", "image")), strict=True)
        new = {(epoch, sample, use) for epoch, sample, use, image in images if image is not None}
        assert seen.isdisjoint(new)
        seen |= new


def test_of_a_unit_with_several_shards_only_the_lost_rows_are_missing(manifest: Manifest, rows: list[ImageRow]) -> None:
    lose(manifest, 2)
    found = 0
    for index, table in enumerate(read_all(tasks_of(manifest, 0, 10, 5))):
        pieces = plan_of(manifest).unit(index).pieces
        if len(pieces) == 1 or 2 not in {piece.shard for piece in pieces}:
            continue
        found += 1
        for row in table.to_pylist():
            gone = 80 <= row["sample_id"] < 120
            assert row["image"] == (None if gone else rows[row["sample_id"]].image)
            assert (row["lost_id"], row["use"]) == (row["sample_id"] if gone else -1, 0)
    assert found == 1


@pytest.mark.parametrize("make", [as_parquet, as_tar, as_objects])
def test_every_kind_of_loss_is_no_end_of_the_run(
    tmp_path: Path, rows: list[ImageRow], make: Callable[..., Manifest]
) -> None:
    manifest = make(str(tmp_path / "set"), rows)
    shard = Path(manifest.shard_uri(1))
    shard.write_bytes(shard.read_bytes()[: manifest.shards[1].bytes // 3])
    lost = {code for table in read_all(tasks_of(manifest, 0, 10, 4)) for code in table["lost_reason"].to_pylist()}
    assert lost == {-1, REASONS.index("shard_unreadable")}


PAGE = b"<!doctype html><title>404</title>"


def spoiled(rows: list[ImageRow], bad: range, instead: bytes = PAGE) -> list[ImageRow]:
    return [replace(row, image=instead) if i in bad else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("make", [as_parquet, as_tar, as_objects])
def test_a_unit_of_error_pages_is_replaced_like_a_lost_one(
    tmp_path: Path, rows: list[ImageRow], make: Callable[..., Manifest]
) -> None:
    whole = read_all(tasks_of(as_parquet(str(tmp_path / "whole"), rows), 0, 20, 3))
    manifest = make(str(tmp_path / "set"), spoiled(rows, range(16, 32)))
    tables = read_all(tasks_of(manifest, 0, 20, 3))
    assert read_all(tasks_of(manifest, 0, 20, 7)) == tables, "whatever the tasks"
    replaced = 0
    for table, before in zip(tables, whole, strict=True):
        if not set(before["sample_id"].to_pylist()) <= set(range(16, 32)):
            assert table == before
            continue
        replaced += 1
        distance = table["use"][0].as_py() // R
        assert set(table["use"].to_pylist()) == {distance * R}
        assert table["lost_id"].to_pylist() == before["sample_id"].to_pylist()
        assert {REASONS[code] for code in table["lost_reason"].to_pylist()} == {"not_an_image"}
        assert table["unit"].to_pylist() == before["unit"].to_pylist()
        assert PAGE not in table["image"].to_pylist()
        assert table.schema == before.schema
    assert replaced == 2, "once in each epoch"


def test_rows_that_are_lost_and_rows_that_are_bad_make_a_unit_of_no_use_together(
    tmp_path: Path, rows: list[ImageRow]
) -> None:
    manifest = as_objects(str(tmp_path / "set"), spoiled(rows, range(3)))
    for number in range(3, 16):
        (tmp_path / "set" / "images" / f"00-{number:03d}.png").unlink()
    found = {}
    for table in read_all(tasks_of(manifest, 0, 10, 4)):
        found |= dict(zip(table["lost_id"].to_pylist(), table["lost_reason"].to_pylist(), strict=True))
    del found[-1]
    assert {i: REASONS[code] for i, code in found.items()} == {
        i: "not_an_image" if i < 3 else "shard_missing" for i in range(16)
    }


def test_one_good_header_keeps_a_unit_and_the_limits_of_the_run_decide(tmp_path: Path, rows: list[ImageRow]) -> None:
    manifest = as_parquet(str(tmp_path / "set"), spoiled(rows, range(1, 16)))
    plan = plan_of(manifest)
    index = next(j for j in range(10) if {p.first_sample_id for p in plan.unit(j).pieces} == {0})
    (task,) = plan_tasks(manifest, plan, index, index + 1, 1)
    assert set(read_planned(task, index)["lost_id"].to_pylist()) == {-1}
    (strict,) = plan_tasks(manifest, plan, index, index + 1, 1, Limits(min_side=29))
    with pytest.raises(DataError, match=r"no image that can be used.*not_an_image, too_small"):
        read_planned(strict, index)


def test_a_shard_that_was_rewritten_ends_the_run(manifest: Manifest, rows: list[ImageRow], tmp_path: Path) -> None:
    other = as_parquet(str(tmp_path / "other"), rows[::-1])
    shard = Path(manifest.shard_uri(1))
    assert Path(other.shard_uri(1)).stat().st_size != shard.stat().st_size
    shard.write_bytes(Path(other.shard_uri(1)).read_bytes())
    with pytest.raises(DataError, match="changed since the manifest was written"):
        read_all(tasks_of(manifest, 0, 10, 4))


def test_a_data_set_that_is_gone_ends_the_run(manifest: Manifest) -> None:
    tasks = tasks_of(manifest, 0, 10, 4)
    for shard in range(4):
        lose(manifest, shard)
    with pytest.raises(DataError, match=r"unit 0 of the plan has no image.*any of the 8 after it.*shard_missing"):
        read_all(tasks)


def test_a_data_set_of_one_unit_has_no_stand_in(tmp_path: Path, rows: list[ImageRow]) -> None:
    manifest = as_parquet(str(tmp_path / "one"), rows[:16])
    (task,) = tasks_of(manifest, 0, 3, 3)
    assert [len(table) for table in read_task(task)] == [16, 16, 16]
    lose(manifest, 0)
    with pytest.raises(DataError, match="any of the 0 after it"):
        read_planned(task, 1)


def test_manifests_of_format_1_are_planned_and_read() -> None:
    """The data set that comes with the clone was written by it."""
    manifest = read_manifest(str(FASHION / "test"))
    assert not len(manifest.table.offsets)
    (table,) = read_all(plan_tasks(manifest, plan_of(manifest), 5, 6, 1))
    assert len(table) == 64
    assert table["image"].null_count == 0


# --- reading ahead --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 100), st.randoms())
def test_results_come_in_order_within_the_bound(costs: list[int], bound: int, random: np.random.Generator) -> None:
    lock, running, pauses = threading.Lock(), dict[int, int](), [random.random() / 500 for _ in costs]
    most = 0

    def read(item: int) -> int:
        nonlocal most
        with lock:
            running[item] = costs[item]
            most = max(most, sum(running.values()) if len(running) > 1 else 0)
        time.sleep(pauses[item])
        return item * 10

    seen = []
    for result in read_ahead(range(len(costs)), read, cost=lambda item: costs[item], max_cost=bound):
        seen.append(result)
        with lock:
            del running[result // 10]
    assert seen == [10 * item for item in range(len(costs))]
    assert most <= bound


def test_items_are_read_while_those_before_are_in_use() -> None:
    """Eight reads of 50 ms each, none of which needs the CPU, take little longer than one."""
    started = time.perf_counter()
    for _ in read_ahead(range(8), lambda _: time.sleep(0.05), cost=lambda _: 1, max_cost=8):
        pass
    assert time.perf_counter() - started < 0.3


def test_a_failing_item_raises_at_its_turn_and_no_later_one_is_begun() -> None:
    begun = []

    def read(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError(item)
        return item

    results = read_ahead(range(100), read, cost=lambda _: 1, max_cost=5)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    assert max(begun) < 10


def test_reading_stops_when_nobody_wants_more() -> None:
    begun = []
    results = read_ahead(range(100), lambda item: begun.append(item) or item, cost=lambda _: 1, max_cost=3)
    next(results)
    results.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert len(begun) <= 5


def test_a_task_reads_ahead_within_its_bytes(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = tasks_of(manifest, 0, 10, 10)
    costs = [task.units[j].bytes_about for j in range(10)]
    total = sum(shard.bytes for shard in manifest.shards)
    assert total * 0.9 < sum(costs) < total * 2, "shared units read several groups"
    begun: list[int] = []
    real = units.read_planned

    def read(task: TaskPlan, index: int) -> pa.Table:
        begun.append(index)
        return real(task, index)

    monkeypatch.setattr(units, "read_planned", read)
    monkeypatch.setattr(units, "BYTES_AHEAD", costs[0] + costs[1])
    next(iter(read_task(task)))
    assert begun == [0, 1]


def test_a_copied_data_set_is_read_by_tasks(manifest: Manifest, tmp_path: Path) -> None:
    whole = read_all(tasks_of(manifest, 0, 10, 4))
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = read_manifest(str(tmp_path / "moved"))
    assert moved.home == str(tmp_path / "set")
    assert moved == replace(manifest, folder=moved.folder)
    assert read_all(tasks_of(moved, 0, 10, 4)) == whole
