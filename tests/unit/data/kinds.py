"""The same images as data sets of all kinds of shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data.manifest import Manifest, Shard, shard_from_file, write_manifest
from simclr_ray.data.shards import ImageRow, write_shard
from simclr_ray.data.tar import groups, walk

UNIT_ROWS, SHARD_ROWS = 16, 40


def tar_of(members: Sequence[tuple[str, bytes]], **options: object) -> bytes:
    """A tar file as Python writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as file:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_shard(uri: str, data: bytes, unit_rows: int = UNIT_ROWS, version: str | None = None) -> Shard:
    """Describe a tar as it would be indexed."""
    found = groups(walk(lambda start, stop: data[start:stop], len(data)), unit_rows)
    return Shard(uri, "tar", storage.digest(data), len(data), found.rows_per_group, found.offsets, version)


def in_shards(rows: Sequence[ImageRow]) -> list[Sequence[ImageRow]]:
    return [rows[start : start + SHARD_ROWS] for start in range(0, len(rows), SHARD_ROWS)]


def as_parquet(folder: str, rows: Sequence[ImageRow]) -> Manifest:
    """Canonical shards."""
    shards = [write_shard(folder, number, some, UNIT_ROWS) for number, some in enumerate(in_shards(rows))]
    return written(Manifest(folder, shards, unit_rows=UNIT_ROWS))


def as_struct(folder: str, rows: Sequence[ImageRow]) -> Manifest:
    """Parquet as Hugging Face's libraries write it: a struct of bytes and path, in row groups of its own size."""
    shards = []
    for number, some in enumerate(in_shards(rows)):
        images = pa.array([{"bytes": row.image, "path": row.uri} for row in some])
        labels = pa.array([row.label for row in some], pa.int64())
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": images, "label": labels}), buffer, row_group_size=UNIT_ROWS)
        data, name = buffer.getvalue(), f"train-{number:05d}.parquet"
        version = storage.write_bytes(storage.join(folder, name), data)
        sizes = [min(UNIT_ROWS, len(some) - start) for start in range(0, len(some), UNIT_ROWS)]
        shards.append(shard_from_file(name, data, sizes, version=version))
    return written(Manifest(folder, shards, unit_rows=UNIT_ROWS, image_column="image.bytes"))


def as_tar(folder: str, rows: Sequence[ImageRow]) -> Manifest:
    """Tars of `.cls`, `.json` and image of each sample."""
    shards = []
    for number, some in enumerate(in_shards(rows)):
        members = []
        for row, image in enumerate(some):
            members += [(f"{row:05d}.cls", str(image.label).encode()), (f"{row:05d}.json", b"{}" * 50)]
            members.append((f"{row:05d}.png", image.image))
        data, name = tar_of(members), f"{number:05d}.tar"
        version = storage.write_bytes(storage.join(folder, name), data)
        shards.append(tar_shard(name, data, version=version))
    return written(Manifest(folder, shards, unit_rows=UNIT_ROWS))


def as_objects(folder: str, rows: Sequence[ImageRow]) -> Manifest:
    """Loose images and lists of them."""
    shards = []
    for number, some in enumerate(in_shards(rows)):
        entries = []
        for row, image in enumerate(some):
            name = f"images/{number:02d}-{row:03d}.png"
            version = storage.write_bytes(storage.join(folder, name), image.image)
            entries.append({"uri": name, "bytes": len(image.image), "version": version, "label": image.label})
        schema = pa.schema(
            [("uri", pa.string()), ("bytes", pa.int64()), ("version", pa.string()), ("label", pa.int32())]
        )
        shards.append(list_shard(folder, f"list-{number:05d}.parquet", pa.Table.from_pylist(entries, schema)))
    return written(Manifest(folder, shards, unit_rows=UNIT_ROWS))


def list_shard(folder: str, name: str, entries: pa.Table) -> Shard:
    """Write a list of loose images and describe it."""
    buffer = io.BytesIO()
    pq.write_table(entries, buffer, row_group_size=UNIT_ROWS)
    data = buffer.getvalue()
    version = storage.write_bytes(storage.join(folder, name), data)
    sizes = [min(UNIT_ROWS, len(entries) - start) for start in range(0, len(entries), UNIT_ROWS)]
    parquet = shard_from_file(name, data, sizes, version=version)
    return Shard(name, "objects", parquet.digest, parquet.bytes, parquet.rows_per_group, parquet.offsets, version)


def written(manifest: Manifest) -> Manifest:
    write_manifest(manifest)
    return manifest


KINDS: dict[str, Callable[[str, Sequence[ImageRow]], Manifest]] = {
    "parquet": as_parquet,
    "struct": as_struct,
    "tar": as_tar,
    "objects": as_objects,
}
