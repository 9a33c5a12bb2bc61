"""Broken and hostile shards: what is readable is used, what is not is named once, and nothing else happens."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.data import open_shards, tar
from simclr_ray.data.index import IndexOptions, IndexReport, index
from simclr_ray.data.manifest import MANIFEST_NAME
from simclr_ray.data.pack import pack
from simclr_ray.data.plan import Plan, UnitTable, share
from simclr_ray.data.shards import ImageRow
from simclr_ray.data.work import REJECTED_NAME
from simclr_ray.errors import DataError
from tests.conftest import all_rows, real_rows
from tests.integration.sources import write_tar

pytestmark = pytest.mark.integration

UNIT = 4


@pytest.fixture(scope="module")
def images() -> list[ImageRow]:
    return real_rows(40)


@pytest.fixture
def source(tmp_path: Path, images: list[ImageRow]) -> Path:
    """Two good tars; tests add bad ones."""
    folder = tmp_path / "source"
    folder.mkdir()
    for shard in range(2):
        some = enumerate(images[10 * shard : 10 * shard + 10])
        write_tar(folder / f"{shard}.tar", [(f"{number}.png", row.image) for number, row in some])
    return folder


@pytest.fixture
def tables(tmp_path: Path, images: list[ImageRow]) -> Path:
    """Two good Parquet files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for shard in range(2):
        rows = images[10 * shard : 10 * shard + 10]
        pq.write_table(
            pa.table({"image": [row.image for row in rows]}), folder / f"{shard}.parquet", row_group_size=UNIT
        )
    return folder


def indexed(source: Path, **options: object) -> IndexReport:
    return index(str(source), f"{source}-new", IndexOptions(unit_rows=UNIT, **options))  # type: ignore[arg-type]


def listed(source: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(Path(f"{source}-new") / REJECTED_NAME).to_pylist()
    return rows


def images_of(source: Path, **options: object) -> Counter[bytes]:
    """Everything that is in a source, by packing it."""
    rows = all_rows(pack(str(source), f"{source}-packed", unit_rows=UNIT, **options).manifest)  # type: ignore[arg-type]
    return Counter(row["image"] for row in rows)  # type: ignore[misc]


def expected(images: list[ImageRow]) -> Counter[bytes]:
    return Counter(row.image for row in images)


# --- row 14 ---------------------------------------------------------------------------------------------------------


def test_row_14_truncated_tar_gives_its_readable_samples(local_ray: None, source: Path, images: list[ImageRow]) -> None:
    write_tar(source / "2.tar", [(f"{number}.png", row.image) for number, row in enumerate(images[20:30])])
    whole = (source / "2.tar").read_bytes()
    with tarfile.open(source / "2.tar") as archive:
        sixth = archive.getmembers()[5]
    (source / "2.tar").write_bytes(whole[: sixth.offset_data + sixth.size // 2])
    report = indexed(source)
    assert report.manifest.rows == 25
    assert report.rejected == {"shard_truncated": 1}
    (entry,) = listed(source)
    assert entry["uri"] == f"{source}/2.tar"
    assert "its first 5 samples are used" in entry["detail"]
    assert images_of(source) == expected(images[:25])


def test_row_14_samples_without_an_image_are_skipped_and_counted(
    local_ray: None, source: Path, images: list[ImageRow]
) -> None:
    write_tar(source / "2.tar", [("a.txt", b"only words"), ("b.png", images[20].image), ("c.json", b"{}")])
    report = indexed(source)
    assert report.manifest.rows == 21
    assert report.counts["without_image"] == 2
    assert images_of(source) == expected(images[:21])


@pytest.mark.parametrize(
    ("names", "words"),
    [(["k7.png", "b.png", "k7.cls"], '"k7" are not neighbours'), (["k7.png", "k7.png"], '"k7.png" is there twice')],
    ids=["apart", "twice"],
)
def test_row_14_keys_apart_or_twice_name_the_key_and_the_fix(
    local_ray: None, source: Path, images: list[ImageRow], names: list[str], words: str
) -> None:
    write_tar(source / "2.tar", [(name, images[0].image) for name in names])
    with pytest.raises(DataError, match=words) as caught:
        indexed(source)
    assert f"{source}/2.tar" in str(caught.value)
    assert "write the tar" in str(caught.value)
    assert not (Path(f"{source}-new") / MANIFEST_NAME).exists()
    write_tar(source / "2.tar", [("k7.png", images[20].image)])
    assert indexed(source).manifest.rows == 21, "mended and run again, it goes on"


# --- row 15 ---------------------------------------------------------------------------------------------------------


def test_row_15_nothing_leaves_the_tar(local_ray: None, source: Path, images: list[ImageRow], tmp_path: Path) -> None:
    """Names that point elsewhere are names; links and devices are no samples."""
    with tarfile.open(source / "2.tar", "w") as archive:
        for name, body in ((f"{tmp_path}/absolute.png", images[20].image), ("../../escaped.png", images[21].image)):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        for name, kind in (("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
    before = {path for path in tmp_path.parent.rglob("*") if path.name in ("absolute.png", "escaped.png", "s.png")}
    assert images_of(source) == expected(images[:22])
    assert before == set()
    after = {path for path in tmp_path.parent.rglob("*") if path.name in ("absolute.png", "escaped.png", "s.png")}
    assert after == set()


@pytest.mark.parametrize("name", ["video.mp4", "a.png"])
def test_row_15_a_member_of_10_gb_is_not_read(source: Path, images: list[ImageRow], name: str) -> None:
    """The file is sparse: it claims 10 GB and takes a few kB of disk."""
    members = [("before.png", images[20].image), (name, None), ("z.png", images[21].image)]
    with (source / "2.tar").open("wb") as file:
        for member, body in members:
            info = tarfile.TarInfo(member)
            info.size = 10 << 30 if body is None else len(body)
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.write(body or b"")
            file.truncate(file.tell() + (info.size if body is None else -file.tell() % tar.BLOCK))
            file.seek(0, io.SEEK_END)
        file.write(bytes(1024))
    found = open_shards.open_shard(str(source / "2.tar"), kind="tar", unit_rows=UNIT)
    assert found.rows == 2
    assert found.too_large == (name == "a.png")
    assert found.without_image == (name == "video.mp4")
    assert found.rows_per_group == (1, 0, 1)
    assert found.read < 1 << 20


# --- row 16 ---------------------------------------------------------------------------------------------------------


def test_row_16_a_column_that_is_not_there_or_of_another_type(local_ray: None, tables: Path) -> None:
    for column in ("picture", "width"):
        with pytest.raises(DataError, match=f'no column "{column}" of encoded images') as caught:
            indexed(tables, column=column)
        assert "image: byte_array" in str(caught.value)
        assert "--column: image" in str(caught.value)
        pq.write_table(pa.table({"image": [b""], "width": [1]}), tables / "0.parquet")
    assert indexed(tables, column="image").manifest.rows == 11, "with the right name it starts again"


def test_row_16_a_source_without_any_column_of_images(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"image": [[1, 2]], "width": [1]}), tmp_path / "source" / "a.parquet")
    with pytest.raises(DataError, match="no column of encoded images") as caught:
        indexed(tmp_path / "source")
    assert "width: int64" in str(caught.value)


def test_row_16_one_file_without_the_column_is_left_out(local_ray: None, tables: Path, images: list[ImageRow]) -> None:
    pq.write_table(pa.table({"picture": [images[30].image], "width": [1]}), tables / "2.parquet")
    report = indexed(tables, column="image")
    assert report.rejected == {"no_column": 1}
    (entry,) = listed(tables)
    assert entry["uri"] == f"{tables}/2.parquet"
    assert "picture: byte_array, width: int64" in entry["detail"]
    assert report.manifest.rows == 20


def test_row_16_null_images_are_rejected_as_null(local_ray: None, tables: Path, images: list[ImageRow]) -> None:
    pq.write_table(pa.table({"image": [images[20].image, None, images[21].image]}), tables / "2.parquet")
    report = pack(str(tables), f"{tables}-packed", unit_rows=UNIT)
    assert report.rejected == {"null": 1}
    assert report.manifest.rows == 22


def test_row_16_a_nested_struct_is_accepted(local_ray: None, tmp_path: Path, images: list[ImageRow]) -> None:
    (tmp_path / "source").mkdir()
    values = [{"bytes": row.image, "path": "a.png"} for row in images[:6]]
    pq.write_table(pa.table({"photo": values}), tmp_path / "source" / "a.parquet")
    assert indexed(tmp_path / "source").manifest.image_column == "photo.bytes"
    assert images_of(tmp_path / "source") == expected(images[:6])


# --- row 17 ---------------------------------------------------------------------------------------------------------


def test_row_17_broken_parquet_is_left_out_and_the_rest_goes_on(
    local_ray: None, tables: Path, images: list[ImageRow]
) -> None:
    good = (tables / "0.parquet").read_bytes()
    (tables / "cut.parquet").write_bytes(good[:-100])
    (tables / "magic.parquet").write_bytes(good[:-4] + b"RAP1")
    (tables / "footer.parquet").write_bytes(good[:-8] + b"\xff\xff\xff\x7f" + b"PAR1")
    (tables / "noise.parquet").write_bytes(b"PAR1" + bytes(range(256)) * 4 + b"\x40\0\0\0PAR1")
    (tables / "short.parquet").write_bytes(b"PAR1")
    (tables / "nothing.parquet").write_bytes(b"")
    report = indexed(tables)
    assert report.rejected == {"shard_unreadable": 6}
    assert report.manifest.rows == 20
    entries = listed(tables)
    assert {Path(entry["uri"]).stem for entry in entries} == {"cut", "magic", "footer", "noise", "short", "nothing"}
    assert all(entry["detail"] and entry["detail"].isprintable() for entry in entries)
    assert images_of(tables) == expected(images[:20])


def test_row_17_a_giant_row_group_is_left_out(
    tables: Path, images: list[ImageRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cap of 5 kB in place of 512 MiB; the file is described in this process."""
    monkeypatch.setattr(open_shards, "GROUP_BYTES", 5_000)
    many = pa.table({"image": [row.image for row in images] * 4})
    pq.write_table(many, tables / "giant.parquet", row_group_size=160, compression="none")
    found = open_shards.open_shard(str(tables / "giant.parquet"), kind="parquet", unit_rows=UNIT)
    assert found.too_large_columns == ["image"]
    small = open_shards.open_shard(str(tables / "0.parquet"), kind="parquet", unit_rows=UNIT)
    assert small.too_large_columns == []


def test_row_17_when_no_shard_can_be_read_the_first_is_shown(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for number in range(3):
        (tmp_path / "source" / f"{number}.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(DataError, match="none of 3 tar files can be used") as caught:
        indexed(tmp_path / "source")
    assert "3 shard_unreadable" in str(caught.value)
    assert "compressed by gzip" in str(caught.value)
    assert not (tmp_path / "source-new" / MANIFEST_NAME).exists()


# --- row 18 ---------------------------------------------------------------------------------------------------------


def test_row_18_a_source_with_nothing_says_what_was_listed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match="no images found") as caught:
        indexed(tmp_path / "source")
    assert "1 other" in str(caught.value)
    assert str(tmp_path / "source") in str(caught.value)
    assert not (tmp_path / "source-new").exists()


def test_row_18_empty_shards_are_skipped_and_counted(local_ray: None, source: Path, images: list[ImageRow]) -> None:
    write_tar(source / "2.tar", [])
    write_tar(source / "3.tar", [("a.txt", b"")])
    report = indexed(source)
    assert report.counts["empty"] == 2
    assert report.rejected == {}
    assert len(report.manifest.shards) == 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shards", [1, 2])
def test_row_18_any_number_of_shards_gives_a_complete_and_disjoint_order(
    local_ray: None, source: Path, shards: int, world_size: int
) -> None:
    for number in range(shards, 2):
        (source / f"{number}.tar").unlink()
    manifest = indexed(source).manifest
    plan = Plan(UnitTable(manifest), seed=0)
    steps = plan.units.num_units // 2
    dealt = [unit for step in range(steps) for rank in range(world_size)
             for unit in share(step, rank, per_step=2, world_size=world_size)]  # fmt: skip
    assert sorted(dealt) == list(range(2 * steps))
    ids = [
        i for unit in range(plan.units.num_units) for piece in plan.unit(unit).pieces
        for i in range(piece.first_sample_id, piece.first_sample_id + piece.stop - piece.start)
    ]  # fmt: skip
    assert len(set(ids)) == len(ids) == manifest.rows - plan.units.rows_left_out
