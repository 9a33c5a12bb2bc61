"""The same real images as every kind of source."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray.data.shards import ImageRow
from tests.conftest import real_rows


def rows(count: int) -> list[ImageRow]:
    return real_rows(count)


def loose(folder: Path, images: list[ImageRow]) -> Path:
    """Folders by label."""
    for number, row in enumerate(images):
        place = folder / f"class {row.label}" / f"{number:04d}{Path(row.uri).suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(row.image)
    return folder


def tars(folder: Path, images: list[ImageRow], each: int = 60) -> Path:
    """As img2dataset writes them: image, text and JSON a sample, and tables beside that describe the tars."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(images), each)):
        members = []
        for number in range(start, min(len(images), start + each)):
            key = f"{shard:05d}{number - start:04d}"
            row = images[number]
            label = str(row.label).encode()
            members += [(key + Path(row.uri).suffix, row.image), (f"{key}.txt", b"some words"), (f"{key}.cls", label)]
        write_tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(pa.table({"key": ["a"], "url": ["https://example.org/a.png"]}), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))


def parquet(folder: Path, images: list[ImageRow], each: int = 70, group: int = 25) -> Path:
    """As Hugging Face writes them: a struct of bytes and path."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(images), each)):
        some = images[start : start + each]
        table = pa.table(
            {
                "image": pa.array(
                    [{"bytes": row.image, "path": row.uri} for row in some],
                    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                ),
                "label": pa.array([row.label for row in some], pa.int64()),
                "caption": ["words"] * len(some),
            }
        )
        pq.write_table(table, folder / f"train-{shard:05d}.parquet", row_group_size=group)
    return folder


def text_list(path: Path, images: Path) -> Path:
    """Addresses relative to the list, and labels."""
    files = sorted(images.rglob("*.png"))
    path.write_text("".join(f"{file.relative_to(path.parent)},{file.parent.name}\n" for file in files))
    return path


def parquet_list(path: Path, images: Path) -> Path:
    """A store's inventory, say."""
    files = sorted(images.rglob("*.png"))
    pq.write_table(
        pa.table({"url": [str(file) for file in files], "label": [file.parent.name for file in files]}), path
    )
    return path
