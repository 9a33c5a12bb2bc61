"""What benchmarks/store.py reads beside canonical shards: the same photo crops in a bucket, as others lay them out.

Each layout is indexed where it lies, as `simclr-ray index` does it, and canonical shards are written straight into the
bucket. Requests and bytes are those of a first reading, footers and headers included; they do not depend on the
machine, so no clock runs here.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from simclr_ray import storage
from simclr_ray.data.index import index
from simclr_ray.data.manifest import UNIT_ROWS, Manifest, Shard, write_manifest
from simclr_ray.data.shards import ImageRow, write_shard

TAR_IMAGES = 256
GROUP_ROWS = 100
"""Of a row group, as Hugging Face's `datasets` writes images."""
SHARD_UNITS = 4


def put_canonical(folder: str, crops: Sequence[bytes]) -> Manifest:
    """Shards as `simclr-ray pack` writes them into a bucket."""
    step = SHARD_UNITS * UNIT_ROWS
    rows = [ImageRow(crop, None, f"{number:06d}.jpg") for number, crop in enumerate(crops)]
    shards: list[Shard] = [
        write_shard(folder, number, rows[start : start + step])
        for number, start in enumerate(range(0, len(rows), step))
    ]
    manifest = Manifest(folder, tuple(shards))
    write_manifest(manifest)
    return manifest


def put_tars(folder: str, crops: Sequence[bytes]) -> None:
    """WebDataset: an image and its caption a sample."""
    for start in range(0, len(crops), TAR_IMAGES):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for number, crop in enumerate(crops[start : start + TAR_IMAGES], start):
                for name, body in ((f"{number:09d}.jpg", crop), (f"{number:09d}.txt", b"some words")):
                    info = tarfile.TarInfo(name)
                    info.size = len(body)
                    archive.addfile(info, io.BytesIO(body))
        storage.write_bytes(f"{folder}/{start // TAR_IMAGES:05d}.tar", file.getvalue())


def put_parquet(folder: str, crops: Sequence[bytes]) -> None:
    """A struct of bytes and path, a column beside it, row groups that are no multiple of a unit."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for start in range(0, len(crops), 4 * GROUP_ROWS):
        some = crops[start : start + 4 * GROUP_ROWS]
        images = [{"bytes": crop, "path": f"{start + number}.jpg"} for number, crop in enumerate(some)]
        file = io.BytesIO()
        table = pa.table({"image": pa.array(images, kind), "caption": ["some words"] * len(some)})
        pq.write_table(table, file, row_group_size=GROUP_ROWS)
        storage.write_bytes(f"{folder}/train-{start // len(some):05d}.parquet", file.getvalue())


def put_loose(folder: str, crops: Sequence[bytes]) -> None:
    """An object an image, in eight folders."""
    with ThreadPoolExecutor(16) as pool:
        names = (f"{folder}/{number % 8}/{number:06d}.jpg" for number in range(len(crops)))
        list(pool.map(storage.write_bytes, names, crops))


@contextmanager
def ray_ready() -> Iterator[None]:
    """A cluster of two CPUs, for an index is made by tasks."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def layouts(folder: str, crops: Sequence[bytes]) -> Iterator[tuple[str, Manifest]]:
    """The same images, laid out anew below a folder of the bucket and indexed."""
    yield "canonical shards", put_canonical(f"{folder}/canonical", crops)
    others: dict[str, Callable[[str, Sequence[bytes]], None]] = {
        "tars": put_tars, "Parquet of others": put_parquet, "loose objects": put_loose,
    }  # fmt: skip
    for name, put in others.items():
        place = f"{folder}/{put.__name__.removeprefix('put_')}"
        put(place, crops)
        yield name, index(place, f"{place}-index", ray_ready=ray_ready).manifest
