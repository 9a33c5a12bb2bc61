"""Rejected images by name: the place follows from the id, the rest from reading once more."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest, Shard
from simclr_ray.data.quarantine import Entry, Quarantine, explained, located, place
from simclr_ray.data.shards import ImageRow
from tests.conftest import make_data_set, real_rows

HOSTILE = "x/\n\x1b[31m<script>'\".png"


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6))
def test_every_sample_has_its_place(groups: list[list[int]]) -> None:
    shards = [Shard(f"{i}", "parquet", "", 1, tuple(rows)) for i, rows in enumerate(groups)]
    manifest = Manifest("/nowhere", tuple(shards), unit_rows=4)
    expected = [
        (shard, group, row)
        for shard, sizes in enumerate(groups) for group, size in enumerate(sizes) for row in range(size)
    ]  # fmt: skip
    assert [place(manifest, sample) for sample in range(manifest.rows)] == expected


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    rows = real_rows(150)
    rows[7] = ImageRow(b"", None, HOSTILE)
    rows[120] = ImageRow(b"<html>\x1b[2Jnot found</html>", None, "second/shard.jpg")
    return make_data_set(tmp_path_factory.mktemp("broken"), rows)


def test_an_entry_tells_shard_row_original_and_what_is_wrong(broken: Manifest) -> None:
    entry = located(broken, Entry(120, "not_an_image", 3))
    assert entry.shard == broken.shard_uri(1)
    assert entry.row == 20
    entry = explained(broken, entry, Limits())
    assert entry.uri == "second/shard.jpg"
    assert entry.detail.startswith("first bytes")
    assert "\x1b" not in entry.detail


def test_row_12_names_are_printable_whatever_they_hold(broken: Manifest) -> None:
    entry = explained(broken, located(broken, Entry(7, "empty", 1)), Limits())
    assert entry.uri == HOSTILE, "kept as it is in the table"
    assert entry.name.isascii()
    assert entry.name.isprintable()


def test_a_shard_that_is_gone_keeps_its_entries_with_their_place(broken: Manifest, tmp_path: Path) -> None:
    gone = make_data_set(tmp_path, real_rows(32))
    for file in tmp_path.glob("shard-*"):
        file.unlink()
    entry = explained(gone, located(gone, Entry(3, "shard_missing", 1)), Limits())
    assert entry.uri == ""
    assert "shard" in entry.detail
    assert entry.name.endswith("row 3")


def test_entries_are_kept_once_and_explained_beside(broken: Manifest) -> None:
    found = [{"sample_id": 7, "reason": "empty", "step": 4}, {"sample_id": 120, "reason": "not_an_image", "step": 4}]
    one = Quarantine(broken, Limits())
    one.add(found)
    one.add([{"sample_id": 7, "reason": "empty", "step": 9}])
    one.settle(10)
    table = one.take_changed()
    assert table is not None
    entries = [Entry(**row) for row in table.to_pylist()]
    assert [(entry.sample_id, entry.step, bool(entry.detail)) for entry in entries] == [(7, 4, True), (120, 4, True)]
    assert entries[1] == explained(broken, located(broken, Entry(120, "not_an_image", 4)), Limits())
    assert one.take_changed() is None
    assert "1 not_an_image (second/shard.jpg)" in one.reasons()
    again = Quarantine(broken, Limits(), table)
    again.add(found)
    assert len(again) == 2
    assert again.take_changed() is None


def test_ids_that_are_no_sample_of_the_manifest_are_listed_without_a_place(broken: Manifest) -> None:
    one = Quarantine(broken, Limits())
    one.add([{"sample_id": 10**9, "reason": "empty", "step": 1}])
    assert one.reasons().startswith("1 empty")


@given(st.lists(st.tuples(st.integers(0, 149), st.sampled_from(["empty", "truncated", "mode"])), max_size=60))
def test_the_table_is_the_first_report_of_each_image(broken_ids: Manifest, found: list[tuple[int, str]]) -> None:
    """Whatever comes in which order, also across restarts: a dictionary is the obvious twin."""
    expected: dict[int, tuple[str, int]] = {}
    one = Quarantine(broken_ids, Limits())
    for step, (sample_id, reason) in enumerate(found):
        expected.setdefault(sample_id, (reason, step))
        one.add([{"sample_id": sample_id, "reason": reason, "step": step}])
        if step == 20:
            one.settle(10)
            one = Quarantine(broken_ids, Limits(), one.take_changed())
    one.settle(10)
    assert len(one) == len(expected)
    table = one.take_changed()
    rows = [] if table is None else table.to_pylist()
    if table is not None:
        assert {row["sample_id"]: (row["reason"], row["step"]) for row in rows} == expected
        assert [row["sample_id"] for row in rows] == sorted(expected)


@pytest.fixture(scope="module")
def broken_ids() -> Manifest:
    """150 rows of a shard that is not there, so that explanations are quick."""
    return Manifest("/nowhere", (Shard("gone", "parquet", "", 1, (100, 50)),), unit_rows=10)
