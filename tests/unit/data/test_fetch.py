"""Ready-made data sets: the same files give the same data set, and the one that is shipped is whole."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_ray import storage
from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.fetch import DATA_SETS, FASHION_CLASSES, fetch_data
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.errors import ConfigError, DataError
from tests.conftest import FASHION, all_rows

CATEGORIES = ("Animals", "Flags", "Smileys")


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """The IDX format: a magic number, the sizes, then the bytes; big-endian, gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    header = b"\x00\x00\x08\x03" + b"".join(size.to_bytes(4, "big") for size in images.shape)
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = b"\x00\x00\x08\x01" + len(labels).to_bytes(4, "big")
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))


def made_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 training and 70 test images as files of MNIST's format."""
    folder = tmp_path_factory.mktemp("idx")
    write_idx(folder, "train", *made_images(150, 1))
    write_idx(folder, "t10k", *made_images(70, 2))
    return folder


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an emoji package: an index of 41 pictures, one of which is not there."""
    folder = tmp_path_factory.mktemp("emoji")
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    entries = []
    for i in range(41):
        entries.append({"unified": f"{0x1F600 + i:X}", "image": f"{i}.png", "category": CATEGORIES[i % 3], "sort": i})
        if i != 7:
            Image.new("RGBA", (64, 64), (5 * i, 255 - 5 * i, 80, 255)).save(pictures / f"{i}.png")
    (folder / "emoji.json").write_text(json.dumps(entries[::-1]), encoding="utf-8")
    return folder


@pytest.fixture
def source(request: pytest.FixtureRequest, idx: Path, emoji: Path) -> tuple[str, str]:
    name: str = request.param
    return name, str({"fashion-mnist": idx, "emoji": emoji}[name])


each_data_set = pytest.mark.parametrize("source", DATA_SETS, indirect=True)


def test_every_image_of_the_idx_files_is_packed_once_with_its_label(idx: Path, tmp_path: Path) -> None:
    for manifest, (images, labels), split in zip(
        fetch_data("fashion-mnist", str(tmp_path), source=str(idx)),
        (made_images(150, 1), made_images(70, 2)),
        ("train", "t10k"),
        strict=True,
    ):
        rows = sorted(all_rows(manifest), key=lambda row: str(row["uri"]))
        assert [row["uri"] for row in rows] == [f"fashion-mnist/{split}/{i:05d}.png" for i in range(len(images))]
        assert [row["label"] for row in rows] == labels.tolist()
        for row, image in zip(rows, images, strict=True):
            with Image.open(io.BytesIO(row["image"])) as picture:
                assert (picture.format, picture.mode) == ("PNG", "L")
                assert (np.asarray(picture) == image).all()
        assert manifest.classes == FASHION_CLASSES


def test_every_fourth_emoji_is_a_test_image_and_no_other(emoji: Path, tmp_path: Path) -> None:
    train, test = (all_rows(manifest) for manifest in fetch_data("emoji", str(tmp_path), source=str(emoji)))
    assert (len(train), len(test)) == (30, 10), "the picture that is not there is left out"
    uris = [str(row["uri"]) for row in train + test]
    assert sorted(uris) == sorted(f"emoji/google/{i}.png" for i in range(41) if i != 7)
    for row in train + test:
        number = int(Path(str(row["uri"])).stem)
        assert row["label"] == number % 3, "classes are the sorted categories"
        assert row["image"] == (emoji / "img" / "google" / "64" / f"{number}.png").read_bytes()


@each_data_set
def test_the_same_files_give_the_same_data_set(source: tuple[str, str], tmp_path: Path) -> None:
    name, folder = source
    once = fetch_data(name, str(tmp_path / "once"), source=folder)
    twice = fetch_data(name, str(tmp_path / "twice"), source=folder)
    assert [manifest.fingerprint for manifest in once] == [manifest.fingerprint for manifest in twice]
    assert once[0].fingerprint != once[1].fingerprint
    for manifest, split in zip(once, ("train", "test"), strict=True):
        assert manifest.folder == str(tmp_path / "once" / split)
        assert read_manifest(manifest.folder) == manifest


@each_data_set
def test_the_licence_is_recorded(source: tuple[str, str], tmp_path: Path) -> None:
    name, folder = source
    words = {"fashion-mnist": "MIT", "emoji": "Apache-2.0"}[name]
    for manifest, split in zip(fetch_data(name, str(tmp_path), source=folder), ("train", "test"), strict=True):
        about = read_manifest(manifest.folder).source
        assert words in about["licence"]
        assert (about["name"], about["split"]) == (name, split)


@each_data_set
def test_limits_keep_the_first_images_of_the_whole_order(source: tuple[str, str], tmp_path: Path) -> None:
    name, folder = source
    whole = fetch_data(name, str(tmp_path / "whole"), source=folder)
    some = fetch_data(name, str(tmp_path / "some"), source=folder, train=20, test=5)
    assert [manifest.rows for manifest in some] == [20, 5]
    for part, everything in zip(some, whole, strict=True):
        kept = [row["uri"] for row in all_rows(part)]
        assert kept == [row["uri"] for row in all_rows(everything)][: len(kept)]


def test_images_are_shuffled_once_so_that_units_are_mixed(idx: Path, tmp_path: Path) -> None:
    train, _ = fetch_data("fashion-mnist", str(tmp_path), source=str(idx))
    uris = [str(row["uri"]) for row in all_rows(train)]
    assert uris != sorted(uris)


@pytest.mark.parametrize("limits", [{"train": 0}, {"test": -1}], ids=str)
def test_a_limit_below_one_is_refused(idx: Path, tmp_path: Path, limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        fetch_data("fashion-mnist", str(tmp_path / "new"), source=str(idx), **limits)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_nothing_is_written_when_one_of_the_folders_is_taken(idx: Path, tmp_path: Path, split: str) -> None:
    (tmp_path / split).mkdir()
    (tmp_path / split / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty") as caught:
        fetch_data("fashion-mnist", str(tmp_path), source=str(idx))
    assert str(tmp_path / split) in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == [split, "notes.txt"]


@pytest.mark.parametrize("missing", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_missing_idx_files_are_a_sentence(tmp_path: Path, missing: str) -> None:
    for split in ("train", "t10k"):
        write_idx(tmp_path / "files", split, *made_images(3, 0))
    (tmp_path / "files" / missing).unlink()
    with pytest.raises(DataError, match="files not found") as caught:
        fetch_data("fashion-mnist", str(tmp_path / "out"), source=str(tmp_path / "files"))
    assert missing in str(caught.value)
    assert "--source" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", gzip.compress(b"\x00" * 16 + b"\x01" * 1000), gzip.compress(b"\x00" * 99999)[:60]],
    ids=["empty", "a web page", "not whole images", "truncated"],
)
def test_broken_idx_files_are_a_sentence(tmp_path: Path, data: bytes) -> None:
    for split in ("train", "t10k"):
        write_idx(tmp_path / "files", split, *made_images(3, 0))
    (tmp_path / "files" / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(DataError, match="not the files of Fashion-MNIST") as caught:
        fetch_data("fashion-mnist", str(tmp_path / "out"), source=str(tmp_path / "files"))
    assert str(tmp_path / "files") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_emoji_files_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="npm"):
        fetch_data("emoji", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no emoji.json"),
        ({"emoji.json": "[]"}, "no img/google/64"),
        ({"emoji.json": "[]", "img/google/64/a.png": ""}, "are missing"),
        ({"emoji.json": "{", "img/google/64/a.png": ""}, "not the index"),
        ({"emoji.json": '[{"name": "cat"}]', "img/google/64/a.png": ""}, "not the index"),
    ],
    ids=["nothing", "no pictures", "none listed", "not JSON", "other JSON"],
)
def test_missing_emoji_files_are_a_sentence(tmp_path: Path, files: dict[str, str], words: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        fetch_data("emoji", str(tmp_path / "out"), source=str(folder))
    assert str(folder) in str(caught.value)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fashion-mnist or emoji"):
        fetch_data("cifar", str(tmp_path))


@pytest.fixture(scope="module")
def shipped() -> dict[str, Manifest]:
    return {split: read_manifest(str(FASHION / split)) for split in ("train", "test")}


@pytest.fixture(scope="module")
def shipped_rows(shipped: dict[str, Manifest]) -> dict[str, list[dict[str, object]]]:
    return {split: all_rows(manifest) for split, manifest in shipped.items()}


def test_the_shipped_shards_are_those_of_their_manifests(shipped: dict[str, Manifest]) -> None:
    for split, manifest in shipped.items():
        assert manifest.classes == FASHION_CLASSES
        assert "MIT" in manifest.source["licence"]
        for index, shard in enumerate(manifest.shards):
            data = Path(manifest.shard_uri(index)).read_bytes()
            assert (len(data), storage.digest(data)) == (shard.bytes, shard.digest)
        present = {path.name for path in (FASHION / split).glob("*.parquet")} - {"manifest.parquet"}
        assert present == {shard.uri for shard in manifest.shards}


def test_the_shipped_classes_are_balanced(shipped_rows: dict[str, list[dict[str, object]]]) -> None:
    for split, rows in shipped_rows.items():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(range(10)), split
        assert max(counts.values()) < 1.25 * min(counts.values()), (split, counts)


def test_no_shipped_image_is_in_both_splits(shipped_rows: dict[str, list[dict[str, object]]]) -> None:
    train, test = ({row["image"] for row in shipped_rows[split]} for split in ("train", "test"))
    assert not train & test
    names = [row["uri"] for rows in shipped_rows.values() for row in rows]
    assert len(set(names)) == len(names)


def test_the_shipped_images_decode(shipped_rows: dict[str, list[dict[str, object]]]) -> None:
    for rows in shipped_rows.values():
        for row in rows[::50]:
            image = decode(row["image"], Limits())
            assert not isinstance(image, Rejected)
            assert image.shape == (28, 28, 3)
