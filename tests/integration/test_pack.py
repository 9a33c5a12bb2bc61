"""Packing on a real Ray: every image that decodes is stored once with its label, and every other one is listed."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_ray import storage
from simclr_ray.data.manifest import MANIFEST_NAME, read_manifest
from simclr_ray.data.pack import Labels, PackReport, pack
from simclr_ray.data.plan import Plan, UnitTable
from simclr_ray.data.stream import read_unit
from simclr_ray.data.work import REJECTED_NAME
from simclr_ray.errors import ConfigError, DataError
from tests.conftest import all_rows, real_rows

pytestmark = pytest.mark.integration

UNIT_ROWS = 16
SMALL_SHARDS = 32 * 500  # about two units of these images, so that there are several shards
BROKEN = {"empty.png": "empty", "page.jpg": "not_an_image", "cut.jpg": "truncated"}


def as_jpeg(image: bytes) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(image)) as picture:
        picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 real images in label folders, some of them nested; three files that are no images; and a text file."""
    folder = tmp_path_factory.mktemp("photos")
    for i, row in enumerate(real_rows(150)):
        place = folder / f"class {row.label}" if i % 2 else folder / "more" / "of" / f"class {row.label}"
        place.mkdir(parents=True, exist_ok=True)
        if i % 3:
            (place / f"{i:03d}.png").write_bytes(row.image)
        else:
            (place / (f"{i:03d}.jpg" if i % 2 else f"{i:03d}.JPEG")).write_bytes(as_jpeg(row.image))
    place = folder / "class 0"
    (place / "empty.png").write_bytes(b"")
    (place / "page.jpg").write_bytes(b"<!doctype html><title>404</title>")
    (place / "cut.jpg").write_bytes(as_jpeg(real_rows(1)[0].image)[:-200])
    (folder / "notes.txt").write_text("not an image, and not called one")
    return folder


@pytest.fixture(scope="module")
def packed(local_ray: None, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> PackReport:
    destination = tmp_path_factory.mktemp("packed") / "new"
    return pack(str(photos), str(destination), labels="folder", seed=5, shard_bytes=SMALL_SHARDS, unit_rows=UNIT_ROWS)


def good_files(photos: Path) -> list[Path]:
    return sorted(path for path in photos.rglob("*") if path.is_file() and path.name not in {*BROKEN, "notes.txt"})


def test_every_image_is_stored_once_with_its_bytes_and_label(photos: Path, packed: PackReport) -> None:
    manifest, rows = packed.manifest, all_rows(packed.manifest)
    assert manifest.classes == tuple(sorted({path.parent.name for path in good_files(photos)}))
    assert sorted(str(row["uri"]) for row in rows) == [str(path) for path in good_files(photos)]
    for row in rows:
        path = Path(str(row["uri"]))
        assert row["image"] == path.read_bytes()
        assert manifest.classes[int(str(row["label"]))] == path.parent.name


def test_files_that_do_not_decode_are_counted_and_listed(photos: Path, packed: PackReport) -> None:
    assert packed.rejected == Counter(BROKEN.values())
    assert packed.num_rejected == 3
    listed = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(packed.manifest.folder, REJECTED_NAME))))
    found = {row["uri"]: row["reason"] for row in listed.to_pylist()}
    assert found == {str(photos / "class 0" / name): reason for name, reason in BROKEN.items()}
    assert all(row["detail"].isprintable() for row in listed.to_pylist())


def test_the_manifest_on_disk_is_the_one_reported(photos: Path, packed: PackReport) -> None:
    manifest = read_manifest(packed.manifest.folder)
    assert manifest == packed.manifest
    about = {"source": str(photos), "seed": 5, "files": 153, "rejected": dict.fromkeys(BROKEN.values(), 1)}
    assert manifest.source == about | {"duplicates": 0, "encoded_anew": 0}
    names = {path.name for path in Path(manifest.folder).iterdir()}
    assert names == {MANIFEST_NAME, REJECTED_NAME, *(shard.uri for shard in manifest.shards)}


def test_small_shards_hold_whole_units_but_for_what_was_left_out(packed: PackReport) -> None:
    shards = packed.manifest.shards
    assert len(shards) >= 3
    for index, shard in enumerate(shards):
        data = Path(packed.manifest.shard_uri(index)).read_bytes()
        assert (len(data), storage.digest(data)) == (shard.bytes, shard.digest)
        assert all(rows == UNIT_ROWS for rows in shard.rows_per_group[:-1])
        assert len(data) < 3 * SMALL_SHARDS


def test_neighbours_in_the_folder_are_not_neighbours_in_the_shards(photos: Path, packed: PackReport) -> None:
    uris = [str(row["uri"]) for row in all_rows(packed.manifest)]
    place = {uri: position for position, uri in enumerate(map(str, good_files(photos)))}
    steps = np.abs(np.diff([place[uri] for uri in uris]))
    assert np.median(steps) > len(uris) / 8


def test_a_packed_data_set_is_read_unit_by_unit(photos: Path, packed: PackReport) -> None:
    """What packing writes is what training reads: each unit whole, no image twice in an epoch, few left out."""
    manifest = packed.manifest
    plan = Plan(UnitTable(manifest), seed=1)
    stored = [row["image"] for row in all_rows(manifest)]
    seen: list[int] = []
    for index in range(plan.units.num_units):
        table = read_unit(manifest, plan.unit(index))
        assert table.num_rows == UNIT_ROWS
        ids = table.column("sample_id").to_pylist()
        assert table.column("image").to_pylist() == [stored[i] for i in ids]
        seen += ids
    assert len(set(seen)) == len(seen) == len(stored) - plan.units.rows_left_out
    assert plan.units.rows_left_out < UNIT_ROWS


def test_the_seed_alone_decides_the_order(photos: Path, packed: PackReport, tmp_path: Path) -> None:
    settings = {"shard_bytes": SMALL_SHARDS, "unit_rows": UNIT_ROWS}
    again = pack(str(photos), str(tmp_path / "again"), labels="folder", seed=5, **settings)
    other = pack(str(photos), str(tmp_path / "other"), labels="folder", seed=6, **settings)
    assert again.manifest.fingerprint == packed.manifest.fingerprint
    assert other.manifest.fingerprint != packed.manifest.fingerprint
    mine, theirs = ([row["uri"] for row in all_rows(report.manifest)] for report in (packed, other))
    assert mine != theirs
    assert sorted(mine, key=str) == sorted(theirs, key=str), "the same images, in another order"


def test_a_list_gives_files_and_labels(local_ray: None, photos: Path, tmp_path: Path) -> None:
    """Paths are relative to the list; it was saved by a spreadsheet, with a byte-order mark and an empty line."""
    home = tmp_path / "home"
    shutil.copytree(photos / "more", home / "pictures, all")
    files = [path.relative_to(home) for path in good_files(home)]
    label = {path: ("even", "odd")[int(path.stem) % 2] + ", really" for path in files}
    lines = [f'"{path}","{label[path]}"' for path in files]
    lines += ["", "gone.png,odd", f"{photos}/class 0/empty.png,odd", f"{home}/pictures,odd"]
    (home / "list.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    report = pack(str(home / "list.csv"), str(tmp_path / "new"), labels="list")
    rows = all_rows(report.manifest)
    assert {str(row["uri"]) for row in rows} == {str(home / path) for path in files}
    assert len(rows) == len(files)
    for row in rows:
        path = Path(str(row["uri"])).relative_to(home)
        assert report.manifest.classes[int(str(row["label"]))] == label[path]
    assert report.num_rejected == 3


def test_without_labels_none_are_stored(photos: Path, local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in good_files(photos)[:5]))
    manifest = pack(str(tmp_path / "list.txt"), str(tmp_path / "new")).manifest
    assert manifest.classes == ()
    assert manifest.unit_rows == 1, "so few images are shuffled one by one"
    assert [row["label"] for row in all_rows(manifest)] == [None] * 5


def test_files_of_which_none_decodes_are_refused_with_the_reasons(
    local_ray: None, photos: Path, tmp_path: Path
) -> None:
    for name in BROKEN:
        shutil.copy(photos / "class 0" / name, tmp_path / name)
    with pytest.raises(DataError, match="none of 3 files is an image") as caught:
        pack(str(tmp_path), str(tmp_path / "new"))
    for reason in BROKEN.values():
        assert f"1 {reason}" in str(caught.value)
    assert not (tmp_path / "new" / MANIFEST_NAME).exists()


@pytest.mark.parametrize(("name", "words"), [(MANIFEST_NAME, "a packed data set is here"), ("my.txt", "not empty")])
def test_a_destination_that_is_not_empty_is_left_alone(photos: Path, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=words) as caught:
        pack(str(photos), str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"mine")]


@pytest.mark.parametrize(
    ("source", "labels", "words"),
    [
        ("absent", "none", "no such folder"),
        ("hollow", "folder", "no images found"),
        ("absent.csv", "list", "no such list"),
        ("hollow.txt", "none", "no images found"),
        ("binary.txt", "none", "not UTF-8"),
        ("short.csv", "list", "line has no label"),
        ("endless.csv", "none", "not a list of images"),
    ],
)
def test_a_source_without_images_is_a_sentence(tmp_path: Path, source: str, labels: Labels, words: str) -> None:
    (tmp_path / "hollow" / "deeper").mkdir(parents=True)
    (tmp_path / "hollow" / "notes.md").write_text("nothing here")
    (tmp_path / "hollow.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00a")
    (tmp_path / "short.csv").write_text("a.png,cat\n\n\nb.png\n")
    (tmp_path / "endless.csv").write_text('"' + "a" * 200_000 + '"')
    with pytest.raises(DataError, match=words) as caught:
        pack(str(tmp_path / source), str(tmp_path / "new"), labels=labels)
    assert str(tmp_path / source) in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_line_without_label_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "short.csv").write_text("a.png,cat\n\n\nb.png\n")
    with pytest.raises(DataError, match=r"short\.csv:4"):
        pack(str(tmp_path / "short.csv"), str(tmp_path / "new"), labels="list")


def test_one_image_is_a_source_too(local_ray: None, photos: Path, tmp_path: Path) -> None:
    one = good_files(photos)[0]
    rows = all_rows(pack(str(one), str(tmp_path / "new")).manifest)
    assert [(row["uri"], row["image"]) for row in rows] == [(str(one), one.read_bytes())]
