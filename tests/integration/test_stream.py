"""The stream on a real local Ray: step k holds the same units for any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from simclr_ray.data.cursor import SegmentCursor
from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Plan, UnitTable
from simclr_ray.data.shards import ImageRow
from simclr_ray.data.stream import PlanAddress, configure_ray_data, unit_stream
from simclr_ray.train.batches import Shares, step_batches
from simclr_ray.views.policy import preset
from simclr_ray.views.stage import ViewStage
from tests.conftest import make_data_set, real_rows

pytestmark = pytest.mark.integration

PER_STEP, R = 4, 16
POLICY = preset("cifar", size=16)


@ray.remote(num_cpus=0)
def _consume(split: Any, cursor: Any, shares: Shares, first: int, last: int) -> list[tuple[int, Any, Any, Any]]:
    def move(segment: Any) -> None:
        if shares.rank == 0:
            ray.get(cursor.move.remote(segment))

    batches = step_batches(split, move, shares, first_step=first, last_step=last)
    return [(batch.step, batch.sample_ids, batch.views.numpy(), batch.rejected) for batch in batches]


def stream_steps(
    manifest: Manifest, world_size: int, *, first: int = 0, last: int = 9, seed: int = 5, per_block: int = 1
) -> dict[int, list[Any]]:
    """Run the stream with W consumers; for each step, the ranks' (ids, views, rejected)."""
    configure_ray_data()
    cursor = SegmentCursor.remote()
    stage = ViewStage(POLICY, seed, Limits())
    address = PlanAddress(manifest.folder, manifest.fingerprint, seed)
    stream = unit_stream(address, cursor, stage, unit_rows=R, units_per_task=3, units_per_block=per_block)
    splits = stream.streaming_split(world_size, equal=True)
    tasks = [
        _consume.remote(split, cursor, Shares(rank, world_size, PER_STEP, 2, R, 20, 2, per_block), first, last)
        for rank, split in enumerate(splits)
    ]
    steps: dict[int, list[Any]] = {}
    for rows in ray.get(tasks):
        for step, *content in rows:
            steps.setdefault(step, []).append(content)
    return steps


def by_sample(ranks: list[Any]) -> dict[int, bytes]:
    """Views of a step by sample id: what the global batch holds, whoever holds it."""
    return {int(i): views.tobytes() for ids, step_views, _ in ranks for i, views in zip(ids, step_views, strict=True)}


@pytest.fixture(scope="module")
def one_worker(local_ray: None, data_set: Manifest) -> dict[int, list[Any]]:
    return stream_steps(data_set, 1)


def test_one_worker_sees_the_plan_in_order_over_epochs(one_worker: dict[int, list[Any]], data_set: Manifest) -> None:
    plan = Plan(UnitTable(data_set), 5)
    for step in range(9):  # 36 units: an epoch of 25 and part of the next
        expected = []
        for index in range(step * PER_STEP, (step + 1) * PER_STEP):
            unit = plan.unit(index)
            ids = [i for p in unit.pieces for i in range(p.first_sample_id, p.first_sample_id + p.stop - p.start)]
            expected += [ids[row] for row in unit.order]
        assert one_worker[step][0][0].tolist() == expected


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_step_holds_the_same_views_for_any_number_of_workers(
    one_worker: dict[int, list[Any]], data_set: Manifest, world_size: int
) -> None:
    """Three does not divide the four units of a step; segments of five steps make the stream restart once."""
    steps = stream_steps(data_set, world_size)
    assert sorted(steps) == list(range(9))
    for step, ranks in steps.items():
        assert len(ranks) == world_size
        assert max(len(ids) for ids, *_ in ranks) - min(len(ids) for ids, *_ in ranks) <= R
        assert by_sample(ranks) == by_sample(one_worker[step])


@pytest.mark.parametrize("first", [0, 5])
def test_units_dealt_together_are_the_same_units(
    one_worker: dict[int, list[Any]], data_set: Manifest, first: int
) -> None:
    """Two units a block, two blocks a step, and tasks of three units made four."""
    steps = stream_steps(data_set, 2, first=first, per_block=2)
    assert sorted(steps) == list(range(first, 9))
    for step, ranks in steps.items():
        assert [len(ids) for ids, *_ in ranks] == [2 * R, 2 * R]
        assert by_sample(ranks) == by_sample(one_worker[step])


def test_a_stream_from_the_middle_continues_the_same_steps(
    one_worker: dict[int, list[Any]], data_set: Manifest
) -> None:
    steps = stream_steps(data_set, 3, first=5)
    assert sorted(steps) == [5, 6, 7, 8]
    for step, ranks in steps.items():
        assert by_sample(ranks) == by_sample(one_worker[step])


def test_broken_images_shift_nothing(
    local_ray: None, data_set: Manifest, one_worker: dict[int, list[Any]], tmp_path: Path
) -> None:
    """Every tenth image is broken: all other samples keep their step, place and views, at two workers too."""
    rows = [
        ImageRow(b"<html>404</html>", row.label, row.uri) if i % 10 == 3 else row
        for i, row in enumerate(real_rows(400))
    ]
    steps = stream_steps(make_data_set(tmp_path / "broken", rows), 2)
    for step, ranks in steps.items():
        whole = by_sample(one_worker[step])
        handed_out = {(int(i), v.tobytes()) for ids, views, _ in ranks for i, v in zip(ids, views, strict=True)}
        assert {(i, views) for i, views in whole.items() if i % 10 != 3} <= handed_out
        rejected = sorted(sample for _, _, bad in ranks for sample, _ in bad)
        assert rejected == sorted(i for i in whole if i % 10 == 3)
        assert sum(len(i) for i, *_ in ranks) == PER_STEP * R
