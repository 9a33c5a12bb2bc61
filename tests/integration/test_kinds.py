"""The stream on a real local Ray over every kind of shard, and over shards that are lost or were rewritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from simclr_ray.data.decode import REASONS
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Plan, UnitTable
from simclr_ray.data.shards import ImageRow
from simclr_ray.errors import DataError, root_cause
from tests.conftest import real_rows
from tests.integration.test_stream import PER_STEP, R, by_sample, stream_steps
from tests.unit.data.kinds import as_objects, as_parquet, as_struct, as_tar

pytestmark = pytest.mark.integration

STEPS = 4
"""16 units: one epoch of the 12 units and part of the next."""


@pytest.fixture(scope="module")
def rows() -> list[ImageRow]:
    """Shards of 40 in groups of 16: 10 units of one group, and 2 of the remainders."""
    return real_rows(200)


@pytest.fixture(scope="module")
def packed(rows: list[ImageRow], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return as_parquet(str(tmp_path_factory.mktemp("packed")), rows)


@pytest.fixture(scope="module")
def expected(local_ray: None, packed: Manifest) -> dict[int, list[Any]]:
    return stream_steps(packed, 1, last=STEPS)


@pytest.mark.parametrize("make", [as_struct, as_tar, as_objects])
def test_every_kind_of_shard_streams_the_same_samples_in_the_same_order(
    expected: dict[int, list[Any]], rows: list[ImageRow], tmp_path: Path, make: Any
) -> None:
    steps = stream_steps(make(str(tmp_path / "set"), rows), 1, last=STEPS)
    assert sorted(steps) == sorted(expected) == list(range(STEPS))
    for step, ((ids, views, rejected),) in steps.items():
        ((expected_ids, expected_views, _),) = expected[step]
        assert ids.tolist() == expected_ids.tolist()
        assert views.tobytes() == expected_views.tobytes()
        assert rejected == ()


def test_a_lost_shard_shifts_nothing_at_any_number_of_workers(
    expected: dict[int, list[Any]], rows: list[ImageRow], tmp_path: Path
) -> None:
    """Its units are replaced and reported; all others keep their step and their views."""
    manifest = as_parquet(str(tmp_path / "set"), rows)
    Path(manifest.shard_uri(2)).unlink()
    lost = range(80, 120)
    one, two = (stream_steps(manifest, workers, last=STEPS) for workers in (1, 2))
    for step in range(STEPS):
        handed_out = [(int(i), v.tobytes()) for ids, views, _ in one[step] for i, v in zip(ids, views, strict=True)]
        assert len(set(handed_out)) == len(handed_out) == PER_STEP * R, "no view is there twice"
        again = [(int(i), v.tobytes()) for ids, views, _ in two[step] for i, v in zip(ids, views, strict=True)]
        assert sorted(again) == sorted(handed_out)
        whole = by_sample(expected[step])
        assert {(i, view) for i, view in whole.items() if i not in lost} <= set(handed_out)
        for ranks in (one[step], two[step]):
            rejected = sorted(entry for _, _, entries in ranks for entry in entries)
            assert rejected == [(i, REASONS.index("shard_missing")) for i in sorted(whole) if i in lost]


@pytest.mark.slow
def test_a_unit_of_error_pages_shifts_nothing_at_any_number_of_workers(
    expected: dict[int, list[Any]], rows: list[ImageRow], tmp_path: Path
) -> None:
    """Not one of its images can be used: another unit stands in, and all others keep their step and their views."""
    bad = range(16, 32)
    some = [replace(row, image=b"<html>404</html>") if i in bad else row for i, row in enumerate(rows)]
    manifest = as_parquet(str(tmp_path / "set"), some)
    runs = [stream_steps(manifest, workers, last=STEPS) for workers in (1, 2, 3)]
    reported = []
    for step in range(STEPS):
        handed_out = [
            sorted((int(i), v.tobytes()) for ids, views, _ in run[step] for i, v in zip(ids, views, strict=True))
            for run in runs
        ]
        assert handed_out[0] == handed_out[1] == handed_out[2]
        assert len(set(handed_out[0])) == PER_STEP * R, "no view is there twice"
        whole = by_sample(expected[step])
        assert {(i, view) for i, view in whole.items() if i not in bad} <= set(handed_out[0])
        for run in runs:
            rejected = sorted(entry for _, _, entries in run[step] for entry in entries)
            assert rejected == [(i, REASONS.index("not_an_image")) for i in sorted(whole) if i in bad]
        reported += rejected
    assert {i for i, _ in reported} == set(bad), "the unit was met"


def test_a_shard_that_was_rewritten_stops_the_stream(local_ray: None, rows: list[ImageRow], tmp_path: Path) -> None:
    manifest, other = (as_parquet(str(tmp_path / name), some) for name, some in (("a", rows[:80]), ("b", rows[80:160])))
    Path(manifest.shard_uri(1)).write_bytes(Path(other.shard_uri(1)).read_bytes())
    assert Plan(UnitTable(manifest), 5).units.num_units == 5
    with pytest.raises(ray.exceptions.RayError) as caught:
        stream_steps(manifest, 1, last=2)
    cause = root_cause(caught.value)
    assert isinstance(cause, DataError)
    assert "changed since the manifest was written" in str(cause)
    assert manifest.shard_uri(1) in str(cause)
