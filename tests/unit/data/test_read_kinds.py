"""Rows come out of every kind of shard the same, and what is wrong with one is told in a sentence."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data import ranges, read_parquet
from simclr_ray.data.decode import REASONS
from simclr_ray.data.manifest import Manifest, Shard, shard_from_file
from simclr_ray.data.plan import Piece, UnitTable
from simclr_ray.data.ranges import LostShard, MissingShard, Source, UnreadableShard
from simclr_ray.data.read import LOST, read_range, read_rows, resolve
from simclr_ray.data.shards import ImageRow
from simclr_ray.data.tar import IMAGE_BYTES
from simclr_ray.errors import DataError
from tests.conftest import real_rows
from tests.unit.data.kinds import KINDS, as_objects, as_parquet, as_tar, list_shard, tar_of, tar_shard


@pytest.fixture(scope="module")
def rows() -> list[ImageRow]:
    return real_rows(90)


@pytest.fixture(scope="module", params=KINDS)
def manifest(
    request: pytest.FixtureRequest, rows: list[ImageRow], tmp_path_factory: pytest.TempPathFactory
) -> Manifest:
    """90 images in shards of 40, in groups of 16."""
    return KINDS[request.param](str(tmp_path_factory.mktemp(request.param)), rows)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_piece_is_its_rows_whatever_the_kind(manifest: Manifest, rows: list[ImageRow], data: st.DataObject) -> None:
    shard = data.draw(st.integers(0, 2))
    groups = manifest.shards[shard].rows_per_group
    group = data.draw(st.integers(0, len(groups) - 1))
    start = data.draw(st.integers(0, groups[group] - 1))
    stop = data.draw(st.integers(start + 1, groups[group]))
    first = 40 * shard + sum(groups[:group]) + start
    column = manifest.image_column
    table = read_rows(manifest, [Piece(shard, group, start, stop, first)], ["label", column])
    assert table.column_names == ["label", column, "sample_id"]
    wanted = rows[first : first + stop - start]
    assert table["sample_id"].to_pylist() == list(range(first, first + stop - start))
    assert table["label"].to_pylist() == [row.label for row in wanted]
    assert table[column].to_pylist() == [row.image for row in wanted]


def test_the_units_of_every_kind_hold_the_same_samples(manifest: Manifest, rows: list[ImageRow]) -> None:
    units = UnitTable(manifest)
    read = [read_rows(manifest, units.pieces(unit), [manifest.image_column]) for unit in range(units.num_units)]
    images = {row["sample_id"]: row[manifest.image_column] for table in read for row in table.to_pylist()}
    assert len(images) == 80
    assert all(image == rows[i].image for i, image in images.items())


def test_a_shard_that_is_gone_is_lost(manifest: Manifest, tmp_path: Path) -> None:
    away = replace(manifest, folder=str(tmp_path))
    with pytest.raises(MissingShard, match="shard is gone") as caught:
        read_rows(away, [Piece(1, 0, 0, 16, 40)], [manifest.image_column])
    assert away.shard_uri(1) in str(caught.value)


def test_no_group_above_the_limit_is_read(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of loose images is a Parquet file as any other; its images have a limit each."""
    monkeypatch.setattr(ranges, "GROUP_BYTES", 100)
    with pytest.raises(UnreadableShard, match=r"group 1 of the shard is too large.*pack the images again|too large"):
        read_rows(manifest, [Piece(0, 1, 0, 4, 16)], [manifest.image_column])


# --- Parquet of others ----------------------------------------------------------------------------------------------


def foreign(folder: Path, table: pa.Table, column: str = "image", **options: Any) -> Manifest:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    (folder / "a.parquet").write_bytes(buffer.getvalue())
    shard = shard_from_file("a.parquet", buffer.getvalue(), [len(table)])
    return Manifest(str(folder), [shard], unit_rows=len(table), image_column=column)


IMAGES = [b"one" * 20, None, b"three", b"one" * 20]
BINARIES = {
    "binary": pa.array(IMAGES, pa.binary()),
    "large_binary": pa.array(IMAGES, pa.large_binary()),
    "dictionary": pa.array(IMAGES, pa.binary()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", BINARIES)
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"use_dictionary": False, "data_page_size": 8},
                                     {"data_page_version": "2.0", "write_page_index": True}], ids=str)  # fmt: skip
def test_every_way_to_write_bytes_is_read(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """Compressed or not, with dictionary pages, many pages or page indexes; a null stays null."""
    others = {"text": ["a", "b", "c", "d"], "image": BINARIES[kind], "n": [1, 2, 3, 4]}
    manifest = foreign(tmp_path, pa.table(others), **options)
    assert read_rows(manifest, [Piece(0, 0, 0, 4, 0)], ["image"])["image"].to_pylist() == IMAGES


def test_a_null_struct_is_a_null_image(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"one", "path": "a"}, None, {"bytes": None, "path": "c"}])
    manifest = foreign(tmp_path, pa.table({"image": image}), "image.bytes")
    table = read_rows(manifest, [Piece(0, 0, 0, 3, 0)], ["image.bytes"])
    assert table["image.bytes"].to_pylist() == [b"one", None, None]


@pytest.mark.parametrize(
    ("column", "values", "found"),
    [
        ("jpg", pa.array([b"a"]), 'no column "jpg".*got image, label'),
        ("image", pa.array([{"bytes": b"a"}]), r'no column "image".*image, label, image\.bytes'),
        ("image", pa.array(["a.jpg"]), "does not hold encoded images.*image: string, label: int64"),
        ("image", pa.array([7]), "does not hold encoded images.*image: int64"),
        ("label", pa.array([b"a"]), "does not hold encoded images.*image: byte_array, label: int64"),
        ("image.list.element", pa.array([[b"a"]]), "does not hold encoded images.*list of byte_array"),
    ],
    ids=["missing", "struct", "text", "number", "label", "list"],
)
def test_a_column_of_no_images_is_told_with_those_there_are(
    tmp_path: Path, column: str, values: pa.Array, found: str
) -> None:
    """An error of the settings, which stops the run, and no lost shard."""
    manifest = foreign(tmp_path, pa.table({"image": values, "label": [1]}), column)
    with pytest.raises(DataError, match=found) as caught:
        read_rows(manifest, [Piece(0, 0, 0, 1, 0)], [column])
    assert not isinstance(caught.value, LostShard)


def test_a_footer_whose_place_is_unknown_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in manifests of format 1; the second footer is longer than what is read at first."""
    manifest = foreign(tmp_path, pa.table({"image": IMAGES, **{f"c{i}": [i] * 4 for i in range(30)}}))
    shard = replace(manifest.shards[0], offsets=())
    for tail in (1 << 16, 100):
        monkeypatch.setattr(read_parquet, "_TAIL_BYTES", tail)
        monkeypatch.setattr(read_parquet, "_FOOTERS", read_parquet._Footers())
        table = read_rows(replace(manifest, shards=[shard]), [Piece(0, 0, 0, 4, 0)], ["image"])
        assert table["image"].to_pylist() == IMAGES


def test_only_the_images_and_the_footer_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = foreign(tmp_path, pa.table({"caption": ["long" * 10_000] * 4, "image": IMAGES}), use_dictionary=False)
    asked: list[int] = []
    real = ranges.read

    def read(source: Source, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return real(source, start, stop)

    monkeypatch.setattr(ranges, "read", read)
    for _ in range(2):
        read_rows(manifest, [Piece(0, 0, 0, 4, 0)], ["image"])
    assert len(asked) == 3, "the footer once, the column twice"
    assert sum(asked) < 5000 < manifest.shards[0].bytes


def test_footers_are_kept_within_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": IMAGES}), buffer)
    footer = pq.read_metadata(io.BytesIO(buffer.getvalue()))
    cost = footer.serialized_size * read_parquet._PARSED
    monkeypatch.setattr(read_parquet, "FOOTERS_BYTES", 3 * cost)
    footers, made = read_parquet._Footers(), list[int]()

    def get(key: int) -> None:
        footers.get(key, lambda: made.append(key) or footer)  # type: ignore[func-returns-value]

    for key in (0, 1, 2, 0, 3, 0, 2, 1):
        get(key)
    assert made == [0, 1, 2, 3, 1], "1 was used longest ago when 3 came"


# --- tar ------------------------------------------------------------------------------------------------------------


def tar_set(folder: Path, data: bytes) -> Manifest:
    (folder / "a.tar").write_bytes(data)
    return Manifest(str(folder), [tar_shard("a.tar", data)], unit_rows=4)


def test_strange_members_are_no_samples(tmp_path: Path) -> None:
    """Names that would leave a folder, links and devices: nothing is extracted, and only images with a key count."""
    names = ["../../etc/a.png", "/abs/b.png", ".hidden.png", "c.txt", "d.jpg", "d.seg.png", "e.JPEG"]
    manifest = tar_set(tmp_path, tar_of([(name, name.encode()) for name in names]))
    (rows,) = manifest.shards[0].rows_per_group
    images = read_rows(manifest, [Piece(0, 0, 0, rows, 0)], ["image"])["image"].to_pylist()
    assert images == [b"../../etc/a.png", b"/abs/b.png", b"d.jpg", b"e.JPEG"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_label_is_a_number_or_nothing(tmp_path: Path) -> None:
    members = [("a.png", b"1"), ("a.cls", b" 7\n"), ("b.png", b"2"), ("c.cls", b"0"), ("c.png", b"3")]
    manifest = tar_set(tmp_path, tar_of(members))
    assert read_rows(manifest, [Piece(0, 0, 0, 3, 0)], ["label"])["label"].to_pylist() == [7, None, 0]
    bad = tar_set(tmp_path, tar_of([("a.png", b"1"), ("a.cls", b"cat\x1b[31m")]))
    with pytest.raises(DataError, match="label of sample 'a' is no number") as caught:
        read_rows(bad, [Piece(0, 0, 0, 1, 0)], ["label"])
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("at", [0, 300, 1024, 1600])
def test_a_tar_of_the_same_size_that_is_damaged_is_unreadable(tmp_path: Path, at: int) -> None:
    """Headers have checksums."""
    data = tar_of([(f"{row}.png", b"x" * 500) for row in range(4)])
    manifest = tar_set(tmp_path, data)
    (tmp_path / "a.tar").write_bytes(data[:at] + b"\xff" * 60 + data[at + 60 :])
    if data[at : at + 1] == b"x":  # what is in an image is its own affair
        assert len(read_rows(manifest, [Piece(0, 0, 0, 4, 0)], ["image"])) == 4
        return
    with pytest.raises(UnreadableShard) as caught:
        read_rows(manifest, [Piece(0, 0, 0, 4, 0)], ["image"])
    assert str(tmp_path / "a.tar") in str(caught.value)


def test_a_tar_of_the_same_size_with_other_samples_is_unreadable(tmp_path: Path) -> None:
    manifest = tar_set(tmp_path, tar_of([(f"{row}.png", b"x") for row in range(4)]))
    (tmp_path / "a.tar").write_bytes(tar_of([(f"{row}.txt", b"x") for row in range(4)]))
    with pytest.raises(UnreadableShard, match="has 0 images where 4 were found before"):
        read_rows(manifest, [Piece(0, 0, 0, 4, 0)], ["image"])


def test_a_tar_has_images_and_labels_alone(tmp_path: Path) -> None:
    manifest = tar_set(tmp_path, tar_of([("a.png", b"x")]))
    with pytest.raises(DataError, match=r'no column "uri".*image, label'):
        read_rows(manifest, [Piece(0, 0, 0, 1, 0)], ["image", "uri"])


def test_a_manifest_that_does_not_know_where_groups_are_is_refused(tmp_path: Path) -> None:
    manifest = tar_set(tmp_path, tar_of([("a.png", b"x")]))
    shard = replace(manifest.shards[0], offsets=())
    with pytest.raises(DataError, match="does not say where the groups of a tar are"):
        resolve(replace(manifest, shards=[shard]), Piece(0, 0, 0, 1, 0))


# --- loose images ---------------------------------------------------------------------------------------------------


def test_a_lost_loose_image_is_null_with_its_reason(tmp_path: Path) -> None:
    """The others of its group are read."""
    (tmp_path / "good.png").write_bytes(b"good")
    (tmp_path / "large.png").touch()
    entries = {
        "uri": ["good.png", "gone.png", "large.png", "gone too.png", str(tmp_path / "good.png")],
        "bytes": pa.array([4, 4, IMAGE_BYTES + 1, None, None], pa.int64()),
        "version": pa.nulls(5, pa.string()),
    }
    manifest = Manifest(str(tmp_path), [list_shard(str(tmp_path), "list.parquet", pa.table(entries))], unit_rows=5)
    table = read_range(resolve(manifest, Piece(0, 0, 0, 5, 10)), ["image"], "image")
    assert table["image"].to_pylist() == [b"good", None, None, None, b"good"]
    names = [None if code < 0 else REASONS[code] for code in table[LOST].to_pylist()]
    assert names == [None, "shard_missing", "too_large", "shard_missing", None]


def test_a_loose_image_of_another_size_is_another_image(tmp_path: Path, rows: list[ImageRow]) -> None:
    manifest = as_objects(str(tmp_path), rows[:20])
    (tmp_path / "images" / "00-003.png").write_bytes(b"another")
    with pytest.raises(DataError, match="changed since the manifest was written") as caught:
        read_rows(manifest, [Piece(0, 0, 0, 16, 0)], ["image"])
    assert not isinstance(caught.value, LostShard)
    assert "00-003.png" in str(caught.value)


# --- copies ---------------------------------------------------------------------------------------------------------


def test_versions_hold_at_home_and_for_shards_that_were_not_copied() -> None:
    shards = [Shard("a.tar", "tar", "d", 1, (1,), (0, 512), "v1"), Shard("s3://b/c.tar", "tar", "d", 1, (1,), (), "v2")]
    home = Manifest("s3://here", shards, home="s3://here")
    assert [home.shard_version(shard) for shard in (0, 1)] == ["v1", "v2"]
    copied = replace(home, folder="s3://there")
    assert [copied.shard_version(shard) for shard in (0, 1)] == [None, "v2"]
    assert copied.fingerprint == home.fingerprint


@pytest.mark.parametrize("make", [as_parquet, as_tar, as_objects])
def test_a_copied_data_set_is_read(tmp_path: Path, rows: list[ImageRow], make: Any) -> None:
    manifest = make(str(tmp_path / "before"), rows[:20])
    (tmp_path / "before").rename(tmp_path / "after")
    moved = replace(manifest, folder=str(tmp_path / "after"), home=str(tmp_path / "before"))
    table = read_rows(moved, [Piece(0, 0, 0, 16, 0)], ["image"])
    assert table["image"].to_pylist() == [row.image for row in rows[:16]]


# --- checksums ------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_of_a_canonical_shard_is_never_trained_on(tmp_path: Path, rows: list[ImageRow]) -> None:
    """Wherever it is in the images of a group: the group is lost, or, in a header's idle bits, read as it was."""
    manifest = as_parquet(str(tmp_path), rows[:16])
    path, images = tmp_path / manifest.shards[0].uri, [row.image for row in rows[:16]]
    data = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(0)
    start, size = column.data_page_offset, column.total_compressed_size
    lost = 0
    places = [*range(start, start + 60), *range(start + 60, start + size, size // 100), start + size - 1]
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            table = read_rows(manifest, [Piece(0, 0, 0, 16, 0)], ["image"])
        except UnreadableShard:  # what is reported as shard_unreadable
            lost += 1
        else:
            assert table["image"].to_pylist() == images, at
    assert lost > 0.9 * len(places)


@pytest.mark.parametrize("known", [True, False])
def test_a_flipped_byte_of_a_canonical_footer_is_never_parsed(
    tmp_path: Path, rows: list[ImageRow], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some flips end the process inside the parser, so that none may reach it."""
    manifest = as_parquet(str(tmp_path), rows[:16])
    monkeypatch.setattr(read_parquet, "_FOOTERS", read_parquet._Footers())
    shard = manifest.shards[0]
    if not known:
        manifest = replace(manifest, shards=[replace(shard, offsets=())])
    path, start = tmp_path / shard.uri, shard.offsets[0]
    data = path.read_bytes()
    end = len(data) if known else len(data) - 8  # behind it is what tells where the footer starts
    for at in range(start, end):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(UnreadableShard, match="checksum"):
            read_rows(manifest, [Piece(0, 0, 0, 16, 0)], ["image"])
    path.write_bytes(data)
    assert pq.read_table(path)["image"].to_pylist() == [row.image for row in rows[:16]]
    assert read_rows(manifest, [Piece(0, 0, 0, 16, 0)], ["image"])["image"].to_pylist() == [r.image for r in rows[:16]]


def test_shards_without_checksums_are_read(tmp_path: Path) -> None:
    """As others write them, and as canonical shards were before."""
    manifest = foreign(tmp_path, pa.table({"image": IMAGES}), write_page_checksum=False)
    assert read_rows(manifest, [Piece(0, 0, 0, 4, 0)], ["image"])["image"].to_pylist() == IMAGES
