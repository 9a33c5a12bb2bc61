"""Indexing and packing from every kind of source: the same images come out, whatever they were stored as."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from simclr_ray.data import index as index_module
from simclr_ray.data import work
from simclr_ray.data.index import IndexOptions, index
from simclr_ray.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from simclr_ray.data.pack import pack
from simclr_ray.data.plan import Piece
from simclr_ray.data.read import read_rows
from simclr_ray.data.shards import ImageRow
from simclr_ray.data.shrink import Shrink
from simclr_ray.errors import ConfigError, DataError
from tests.conftest import all_rows
from tests.integration import sources

pytestmark = pytest.mark.integration

UNIT = 16
COUNT = 150


@pytest.fixture(scope="module")
def images() -> list[ImageRow]:
    return sources.rows(COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: list[ImageRow]) -> Path:
    """All sources, side by side."""
    root = tmp_path_factory.mktemp("sources")
    sources.loose(root / "loose", images)
    sources.tars(root / "tars", images)
    sources.parquet(root / "parquet", images)
    sources.text_list(root / "list.csv", root / "loose")
    sources.parquet_list(root / "list.parquet", root / "loose")
    return root


def stored(manifest: Manifest) -> Counter[bytes]:
    """All images of an index, read as training reads them."""
    pieces = []
    for shard, entry in enumerate(manifest.shards):
        first = int(manifest.first_sample_ids()[shard])
        for group, rows in enumerate(entry.rows_per_group):
            if rows:
                pieces.append(Piece(shard, group, 0, rows, first))
            first += rows
    return Counter(read_rows(manifest, pieces, [manifest.image_column])[manifest.image_column].to_pylist())


KINDS = {
    "loose": ("loose", "folder", "objects"),
    "tars": ("tars", "stored", "tar"),
    "parquet": ("parquet", "stored", "parquet"),
    "csv": ("list.csv", "list", "objects"),
    "parquet list": ("list.parquet", "list", "objects"),
}


@pytest.mark.parametrize(("name", "labels", "kind"), KINDS.values(), ids=KINDS)
def test_an_index_holds_every_image_once(
    local_ray: None, folder: Path, tmp_path: Path, images: list[ImageRow], name: str, labels, kind: str
) -> None:
    report = index(str(folder / name), str(tmp_path / "new"), IndexOptions(labels=labels, unit_rows=UNIT))
    assert stored(report.manifest) == Counter(row.image for row in images)
    assert report.manifest == read_manifest(str(tmp_path / "new"))
    assert {shard.kind for shard in report.manifest.shards} == {kind}
    assert report.rejected == {}
    left = {path.name for path in (tmp_path / "new").iterdir() if not path.name.startswith("list-")}
    assert left == {MANIFEST_NAME, work.REPORT_NAME}
    about = json.loads((tmp_path / "new" / work.REPORT_NAME).read_text())
    assert about["counts"]["images"] == COUNT
    if kind == "parquet":
        assert report.manifest.image_column == "image.bytes"


@pytest.fixture(scope="module")
def packed(
    local_ray: None, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, object]]]:
    """The rows of a pack of each source."""
    root = tmp_path_factory.mktemp("packed")
    return {
        key: all_rows(
            pack(str(folder / name), str(root / key), labels=labels, shard_bytes=30_000, unit_rows=UNIT).manifest
        )
        for key, (name, labels, _) in KINDS.items()
    }


def test_packing_gives_the_same_images_and_labels(packed: dict[str, list[dict]], images: list[ImageRow]) -> None:
    expected = Counter((row.image, row.label) for row in images)
    present = sorted({int(row.label or 0) for row in images})
    for key, rows in packed.items():
        named = key in ("loose", "csv", "parquet list")  # labels are numbers of sorted names there
        assert Counter((row["image"], present[row["label"]] if named else row["label"]) for row in rows) == expected, (
            key
        )


def test_rows_say_where_they_come_from(packed: dict[str, list[dict]], folder: Path) -> None:
    ends = {key: str(rows[0]["uri"]) for key, rows in packed.items()}
    assert Path(ends["loose"]).is_file()
    tar, _, key = ends["tars"].partition(".tar#")
    assert (folder / "tars" / f"{Path(tar).name}.tar").is_file()
    assert key.isdigit()
    assert ".parquet#" in ends["parquet"]
    for rows in packed.values():
        assert len({row["uri"] for row in rows}) == COUNT


@pytest.mark.parametrize("key", ["tars", "parquet"])
def test_neighbours_of_a_shard_come_from_all_over_the_source(packed: dict[str, list[dict]], key: str) -> None:
    first = [str(row["uri"]).partition("#")[0] for row in packed[key][: 2 * UNIT]]
    assert len(set(first)) > 1
    assert first != sorted(first)


def test_repacking_keeps_images_labels_and_classes(
    local_ray: None, folder: Path, tmp_path: Path, images: list[ImageRow]
) -> None:
    once = pack(str(folder / "loose"), str(tmp_path / "one"), labels="folder", unit_rows=UNIT)
    twice = pack(str(tmp_path / "one"), str(tmp_path / "two"), seed=1, shard_bytes=20_000, unit_rows=8)
    assert twice.manifest.classes == once.manifest.classes
    assert twice.manifest.unit_rows == 8
    assert len(twice.manifest.shards) > 1
    rows = [Counter((r["image"], r["label"], r["uri"]) for r in all_rows(one.manifest)) for one in (once, twice)]
    assert rows[0] == rows[1]
    with pytest.raises(ConfigError, match="is a data set already"):
        index(str(tmp_path / "one"), str(tmp_path / "three"))


def test_packing_an_index_is_packing_its_source(
    local_ray: None, folder: Path, tmp_path: Path, images: list[ImageRow]
) -> None:
    index(str(folder / "tars"), str(tmp_path / "index"), IndexOptions(unit_rows=UNIT))
    rows = all_rows(pack(str(tmp_path / "index"), str(tmp_path / "new"), unit_rows=UNIT).manifest)
    assert Counter((row["image"], row["label"]) for row in rows) == Counter((row.image, row.label) for row in images)


def test_images_are_made_smaller_on_the_way(local_ray: None, folder: Path, tmp_path: Path) -> None:
    report = pack(str(folder / "loose"), str(tmp_path / "new"), unit_rows=UNIT, encode=Shrink(16, 80))
    assert report.encoded_anew == COUNT
    assert all(row["image"].startswith(b"\xff\xd8") for row in all_rows(report.manifest))
    assert report.manifest.source["encoded_anew"] == COUNT


def test_duplicates_are_left_out_and_listed(local_ray: None, images: list[ImageRow], tmp_path: Path) -> None:
    """Three copies of bytes, in tars; the first of them stays."""
    some = images[:40]
    sources.tars(tmp_path / "tars", [*some, *some[:10], *some[5:10]], each=30)
    report = pack(
        str(tmp_path / "tars"), str(tmp_path / "new"), unit_rows=UNIT, deduplicate="exact", shard_bytes=20_000
    )
    rows = all_rows(report.manifest)
    assert Counter(row["image"] for row in rows) == Counter({row.image for row in some})
    assert report.duplicates == report.manifest.source["duplicates"] == 55 - len({row.image for row in some})
    listed = pq.read_table(tmp_path / "new" / "duplicates.parquet").to_pylist()
    assert len(listed) == report.duplicates
    kept = {row["uri"] for row in rows}
    for row in listed:
        assert row["kept_uri"] in kept
        assert row["dropped_uri"] not in kept
        assert row["kept"] < row["dropped"]
        assert row["distance"] == 0


def test_near_duplicates_are_left_out_where_wanted(local_ray: None, images: list[ImageRow], tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    sources.loose(tmp_path / "all", images[:30])
    for number in range(10):
        with Image.open(BytesIO(images[number].image)) as image:
            image.convert("RGB").save(tmp_path / "all" / f"copy-{number}.jpg", quality=92)
    near = pack(str(tmp_path / "all"), str(tmp_path / "near"), unit_rows=UNIT, deduplicate="near", distance=6)
    exact = pack(str(tmp_path / "all"), str(tmp_path / "exact"), unit_rows=UNIT, deduplicate="exact")
    assert exact.duplicates == 0
    assert exact.manifest.rows == 40
    assert 8 <= near.duplicates <= 12
    assert near.manifest.rows == 40 - near.duplicates
    listed = pq.read_table(tmp_path / "near" / "duplicates.parquet")["distance"].to_pylist()
    assert all(distance <= 6 for distance in listed)


def test_a_folder_of_several_kinds_asks_which(local_ray: None, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several kinds") as caught:
        pack(str(folder), str(tmp_path / "new"))
    assert "150 objects" in str(caught.value)
    assert "--kind tar" in str(caught.value)
    assert not (tmp_path / "new").exists()
    report = pack(str(folder), str(tmp_path / "new"), kind="tar", unit_rows=UNIT)
    assert report.manifest.rows == COUNT


def test_a_destination_inside_the_source_is_no_part_of_it(
    local_ray: None, images: list[ImageRow], tmp_path: Path
) -> None:
    sources.loose(tmp_path, images[:20])
    report = pack(str(tmp_path), str(tmp_path / "packed"), unit_rows=4)
    assert report.manifest.rows == 20


def test_which_column_is_asked_where_it_cannot_be_told(local_ray: None, images: list[ImageRow], tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "source").mkdir()
    data = [row.image for row in images[:20]]
    pq.write_table(pa.table({"thumb": data, "full": data}), tmp_path / "source" / "a.parquet")
    with pytest.raises(DataError, match=r"full, thumb.*\n.*--column"):
        index(str(tmp_path / "source"), str(tmp_path / "new"))
    report = index(str(tmp_path / "source"), str(tmp_path / "other"), IndexOptions(column="full"))
    assert stored(report.manifest) == Counter(data)


def test_labels_that_are_text_are_numbered(local_ray: None, images: list[ImageRow], tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "source").mkdir()
    for part, names in enumerate((["dog", "cat"], ["emu", None])):
        table = pa.table(
            {"image": [row.image for row in images[2 * part : 2 * part + 2]], "label": pa.array(names, pa.string())}
        )
        pq.write_table(table, tmp_path / "source" / f"{part}.parquet")
    manifest = pack(str(tmp_path / "source"), str(tmp_path / "new"), labels="stored").manifest
    assert manifest.classes == ("cat", "dog", "emu")
    found = {row["image"]: row["label"] for row in all_rows(manifest)}
    assert [found[row.image] for row in images[:4]] == [1, 0, 2, None]


@pytest.mark.parametrize("labels", ["folder", "list"])
def test_labels_that_a_source_cannot_have_are_refused(folder: Path, tmp_path: Path, labels) -> None:
    with pytest.raises(ConfigError, match=f"labels={labels}"):
        pack(str(folder / "tars"), str(tmp_path / "new"), labels=labels)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["web.txt", "web.parquet"])
def test_web_addresses_are_refused(tmp_path: Path, name: str) -> None:
    import pyarrow as pa

    urls = ["HTTP://169.254.169.254/latest/meta-data", "a.png"]
    if name.endswith(".txt"):
        (tmp_path / name).write_text("\n".join(urls))
    else:
        pq.write_table(pa.table({"url": urls}), tmp_path / name)
    with pytest.raises(ConfigError, match="web addresses, which are not read") as caught:
        pack(str(tmp_path / name), str(tmp_path / "new"))
    assert "allow_http" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_large_row_groups_are_told_with_what_they_cost(local_ray: None, images: list[ImageRow], tmp_path: Path) -> None:
    sources.parquet(tmp_path / "large", images, each=150, group=150)
    sources.parquet(tmp_path / "small", images, each=150, group=UNIT)
    large, small = (
        index(str(tmp_path / name), str(tmp_path / f"{name}-index"), IndexOptions(unit_rows=UNIT))
        for name in ("large", "small")
    )
    (note,) = large.notes
    assert "10.0 bytes for each byte of images stored" in note, "nine units of 16, and the rest"
    assert "pack the source" in note
    (note,) = small.notes
    assert note.endswith("1.0 bytes for each byte of images stored")
    report = json.loads((tmp_path / "large-index" / work.REPORT_NAME).read_text())
    assert (report["read_per_stored"], report["notes"]) == (10.0, large.notes)


def test_loose_images_that_stay_in_order_are_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert index(str(folder / "loose"), str(tmp_path / "few"), IndexOptions(unit_rows=UNIT)).notes == []
    monkeypatch.setattr(index_module, "SHUFFLED_WHOLE", COUNT - 1)
    report = index(str(folder / "loose"), str(tmp_path / "many"), IndexOptions(unit_rows=UNIT))
    (note,) = report.notes
    assert "keep the order of their URIs" in note
    assert "pack them" in note
    first = read_rows(report.manifest, [Piece(0, 0, 0, UNIT, 0)], ["uri"])["uri"].to_pylist()
    assert first == sorted(first)
