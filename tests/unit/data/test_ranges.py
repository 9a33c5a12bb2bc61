"""Ranges: parts cover them once, and a shard that is not as it was is told apart as lost or as changed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data import ranges
from simclr_ray.data.ranges import MissingShard, Source, UnreadableShard
from simclr_ray.errors import DataError
from tests.unit.data.kinds import tar_of


@given(st.integers(0, 2**40), st.integers(0, 2**30))
def test_parts_are_a_range_cut_into_nearly_equal_pieces(start: int, length: int) -> None:
    parts = ranges.parts(start, start + length)
    assert [start, *(end for _, end in parts)] == [*(begin for begin, _ in parts), start + length]
    sizes = [end - begin for begin, end in parts]
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert all(0 < size <= ranges.PART_BYTES for size in sizes)


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, 999), length=st.integers(0, 1000), in_parts_above=st.sampled_from([10, 10**6]))
def test_a_range_is_the_same_bytes_in_parts_or_whole(
    tmp_path_factory: pytest.TempPathFactory, start: int, length: int, in_parts_above: int
) -> None:
    data = bytes(i * 7 % 251 for i in range(1000))
    file = tmp_path_factory.mktemp("ranges") / "shard"
    file.write_bytes(data)
    stop = min(1000, start + length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "IN_PARTS_ABOVE", in_parts_above)
        patch.setattr(ranges, "PART_BYTES", 64)
        assert ranges.read(Source(str(file), "tar", 1000, None), start, stop) == data[start:stop]


def parquet_file(rows: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x" * 5000] * rows}), buffer, use_dictionary=False, compression="none")
    return buffer.getvalue()


def tar_file(rows: int) -> bytes:
    return tar_of([(f"{row}.png", b"x" * 5000) for row in range(rows)])


@pytest.mark.parametrize(("kind", "made"), [("parquet", parquet_file), ("objects", parquet_file), ("tar", tar_file)])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda made: made(9), DataError),
        (lambda made: made(3), DataError),
        (lambda made: made(6)[:25_000], UnreadableShard),
        (lambda made: b"", UnreadableShard),
        (lambda made: b"<html>no longer here</html>", UnreadableShard),
    ],
    ids=["rewritten longer", "rewritten shorter", "cut off", "empty", "a web page"],
)
def test_a_shard_of_another_size_was_rewritten_or_cut_off(
    tmp_path: Path, kind: str, made: Callable[[int], bytes], change: Callable[..., bytes], error: type[DataError]
) -> None:
    """A rewritten one would train on other samples than planned; one that was cut off is lost, and no more."""
    file = tmp_path / "shard"
    file.write_bytes(change(made))
    with pytest.raises(DataError) as caught:
        ranges.verify(Source(str(file), kind, len(made(6)), None))
    assert type(caught.value) is error
    assert str(file) in str(caught.value)


def test_a_shard_that_is_as_it_was_is_named_by_its_state(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(tar_file(2))
    source = Source(str(file), "tar", file.stat().st_size, None)
    key = ranges.verify(source)
    assert key == ranges.verify(source)
    file.write_bytes(tar_file(2).replace(b"xx", b"yy"))
    assert key != ranges.verify(source), "so that no footer of before is used"


def test_a_shard_that_is_gone_is_missing(tmp_path: Path) -> None:
    source = Source(str(tmp_path / "shard"), "tar", 10, None)
    for attempt in (lambda: ranges.verify(source), lambda: ranges.read(source, 0, 10)):
        with pytest.raises(MissingShard, match="was in the manifest"):
            attempt()


def test_a_range_past_the_end_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"x" * 10)
    with pytest.raises(UnreadableShard, match="cut off"):
        ranges.read(Source(str(tmp_path / "shard"), "tar", 20, None), 5, 20)
