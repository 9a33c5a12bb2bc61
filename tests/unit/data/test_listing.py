"""Listing in parts gives what listing at once gives, in the same order, however it is cut and where it was killed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray import storage
from simclr_ray.data import listing
from simclr_ray.data.listing import Job, Listing, cut, kind_of, list_folder

# Names that sort between a folder's name and what is in it, and beside it.
NAMES = ["a", "a-", "a.", "a/b", "b", "z", "A", "\u00e4", "\U0001f600"]
trees = st.sets(
    st.tuples(
        st.lists(st.sampled_from(NAMES), max_size=3).map("/".join),
        st.sampled_from(["x.jpg", "y.PNG", "0.tar", "t.parquet", "notes.txt", "a.jpg", "a-.jpg", "a..webp"]),
    ).map(lambda one: "/".join(part for part in one if part)),
    max_size=40,
)


def entries(found: Listing) -> list[tuple[str, int]]:
    rows = pa.concat_tables([*found.tables(), listing.SCHEMA.empty_table()])
    return list(zip(rows["uri"].to_pylist(), rows["bytes"].to_pylist(), strict=True))


def twin(source: str) -> list[tuple[str, int]]:
    """The obvious way: all at once, then sorted."""
    return sorted((uri, size) for uri, size in storage.list_files(source) if kind_of(uri))


@pytest.mark.parametrize("store", ["local", "memory"])
@given(trees, st.integers(1, 4), st.integers(1, 40), st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_the_listing_is_what_listing_at_once_gives(
    store: str, tmp_path_factory: pytest.TempPathFactory, tree: set[str], page: int, jobs: int, part_rows: int
) -> None:
    source = str(tmp_path_factory.mktemp("tree")) if store == "local" else "memory://bucket/tree"
    work = str(tmp_path_factory.mktemp("work"))
    fsspec.filesystem("memory").store.clear()
    for number, name in enumerate(sorted(tree)):
        if not any(other.startswith(f"{name}/") for other in tree):
            storage.write_bytes(storage.join(source, name), bytes(number))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "PAGE", page)  # the smaller, the more folders are looked into
        patch.setattr(listing, "JOBS", jobs)
        patch.setattr(listing, "PART_ROWS", part_rows)
        found = list_folder(source, work, threads=3)
        assert entries(found) == twin(source)
        assert found.rows == len(twin(source))
        assert found.bytes == sum(size for _, size in twin(source))
        assert entries(list_folder(source, work, threads=1)) == twin(source), "read again from the working folder"
    assert sum(found.kinds.values()) == len(storage.list_files(source))


@pytest.fixture
def tree(tmp_path: Path) -> str:
    """1,300 small files, so that the top is looked into: 13 folders of 100."""
    source = tmp_path / "source"
    for number in range(1300):
        place = source / f"{number % 13:02d}" / f"{number:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"x")
    (source / "top.jpg").write_bytes(b"y")
    return str(source)


def test_folders_are_cut_into_jobs(tree: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        jobs = cut(tree, pool)
    assert jobs[0] == Job(tree, deep=False)
    assert [job.uri for job in jobs[1:]] == [f"{tree}/{i:02d}" for i in range(13)]
    assert all(job.deep for job in jobs[1:])


def test_a_row_of_files_is_never_brought_into_memory_as_one_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    monkeypatch.setattr(listing, "PAGE", 20)
    monkeypatch.setattr(storage, "list_level", lambda uri: pytest.fail(f"{uri} was listed as one level"))
    with ThreadPoolExecutor(1) as pool:
        assert cut(str(tmp_path), pool) == (Job(str(tmp_path), deep=True),)


def test_what_is_listed_is_not_listed_again(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after some jobs: those keep their parts, also where the store has changed since."""
    work = tmp_path / "work"
    whole = list_folder(tree, str(work), threads=2)
    notes = sorted(work.glob("job-*.json"))
    for note in notes[5:]:
        note.unlink()
    scanned: list[str] = []
    scan = storage.scan
    monkeypatch.setattr(storage, "scan", lambda uri: (scanned.append(uri), scan(uri))[1])
    again = list_folder(tree, str(work), threads=2)
    assert sorted(scanned) == [f"{tree}/{i:02d}" for i in range(4, 13)]
    assert entries(again) == entries(whole) == twin(tree)


def test_pages_grow_with_the_objects(tree: str, tmp_path: Path) -> None:
    """Each job says what it cost, so that the growth law can be checked on a real store."""
    found = list_folder(tree, str(tmp_path / "work"), threads=2)
    assert [part.pages for part in found.parts] == [1] * 14
    assert [part.rows for part in found.parts] == [1] + [100] * 13
    note = json.loads((tmp_path / "work" / "job-00003.json").read_bytes())
    assert note["kinds"] == {"objects": 100}
    assert note["seconds"] >= 0


def test_folders_can_be_left_out(tree: str, tmp_path: Path) -> None:
    found = list_folder(tree, str(tmp_path / "work"), leave_out=[f"{tree}/00/", f"{tree}/1"])
    assert {uri.split("/")[-2] for uri, _ in entries(found)} == {"source", *(f"0{i}" for i in range(1, 10))}


def test_names_that_are_no_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(b"")
    (tmp_path / "b\udcffd.jpg").write_bytes(b"")
    found = list_folder(str(tmp_path), str(tmp_path / "work"), leave_out=[f"{tmp_path}/work/"])
    assert found.kinds == {"objects": 1, "other": 1, "name_not_utf8": 1}
    assert [uri for uri, _ in entries(found)] == [str(tmp_path / "good.jpg")]


def test_keys_with_empty_parts_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an object store `a//b.jpg` is a key; its folder's name would lose the slash and be looked into for ever."""
    page = [storage.Entry(f"s3://bucket/a//{number}.jpg", 1, None) for number in range(3)]
    page.append(storage.Entry("s3://bucket/a/c/d.jpg", 1, None))
    monkeypatch.setattr(listing, "PAGE", 4)
    monkeypatch.setattr(storage, "scan", lambda uri: iter([page]))
    monkeypatch.setattr(storage, "list_level", lambda uri: (["s3://bucket/a", "s3://bucket/a/c"], []))
    with ThreadPoolExecutor(1) as pool:
        assert cut("s3://bucket/a", pool) == (Job("s3://bucket/a", deep=True),)
