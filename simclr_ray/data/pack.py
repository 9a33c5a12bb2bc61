"""Pack loose images into canonical shards and a manifest, as a Ray Data job.

The images are listed once, shuffled once by seed (so that a training run only has to permute units), read and
checked by Ray tasks, one shard a task, and the manifest is written last. Files that do not decode are left out,
counted, and listed in `rejected.parquet` beside the manifest.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.manifest import UNIT_ROWS, Manifest, Shard, write_manifest
from simclr_ray.data.shards import ImageRow, refuse_non_empty, shuffled, write_shard
from simclr_ray.errors import DataError, root_cause

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
REJECTED_NAME = "rejected.parquet"
READ_THREADS = 16
QUOTE = '"'

Labels = Literal["none", "folder", "list"]


@dataclass(frozen=True)
class Listed:
    """One image to pack."""

    uri: str
    bytes: int
    label: str | None


@dataclass(frozen=True)
class PackReport:
    """What `pack` did."""

    manifest: Manifest
    rejected: Mapping[str, int]
    """Reason -> number of files."""

    @property
    def num_rejected(self) -> int:
        """Files left out."""
        return sum(self.rejected.values())


def pack(
    source: str,
    destination: str,
    *,
    labels: Labels = "none",
    seed: int = 0,
    shard_bytes: int = 256 << 20,
    unit_rows: int = UNIT_ROWS,
    limits: Limits | None = None,
    ray_ready: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> PackReport:
    """Pack the images of `source` into `destination`.

    Args:
        source: Folder of images (local or object store, searched recursively), or a .txt/.csv file with one URI a
            line and, for `labels="list"`, the label after a comma.
        destination: Empty or absent folder for the data set.
        labels: Where labels come from: nowhere, the name of an image's folder, or the list's second column.
        seed: Address of the shuffle.
        shard_bytes: Wanted size of a shard.
        unit_rows: Rows of a unit.
        limits: What an image may be.
        ray_ready: Makes a context in which Ray is connected; entered once source and destination are found good.

    Raises:
        DataError: nothing to read, or no image among it.
        ConfigError: the destination is not empty.
    """
    source, destination = storage.normalise(source), storage.normalise(destination)
    listed = list_images(source, labels)
    refuse_non_empty(destination)
    classes = tuple(sorted({image.label for image in listed if image.label is not None}))
    numbers = {name: number for number, name in enumerate(classes)}
    order = shuffled(len(listed), seed)
    rows_each = _rows_per_shard(listed, shard_bytes, unit_rows)
    specs = [
        {
            "index": index,
            "folder": destination,
            "unit_rows": unit_rows,
            "uris": [listed[i].uri for i in order[start : start + rows_each]],
            "labels": [numbers.get(listed[i].label or "", -1) for i in order[start : start + rows_each]],
        }
        for index, start in enumerate(range(0, len(listed), rows_each))
    ]
    with ray_ready():
        results = sorted(_run(specs, limits or Limits()), key=lambda result: result["index"])
    shards = tuple(Shard(**{**result["shard"], "rows_per_group": tuple(result["shard"]["rows_per_group"])})
                   for result in results if result["shard"]["rows_per_group"])  # fmt: skip
    rejected = [entry for result in results for entry in result["rejected"]]
    if not shards:
        raise DataError(f"none of {len(listed)} files is an image", where=source, got=_reasons(rejected))
    if rejected:
        _write_rejected(destination, rejected)
    made_from = {"source": source, "seed": seed, "files": len(listed), "rejected": len(rejected)}
    manifest = Manifest(destination, shards, unit_rows=unit_rows, classes=classes, source=made_from)
    write_manifest(manifest)
    return PackReport(manifest, Counter(entry["reason"] for entry in rejected))


def list_images(source: str, labels: Labels) -> list[Listed]:
    """Every image of a folder or list file, sorted by URI.

    Raises:
        DataError: when the source is absent, unreadable or has no image.
    """
    if source.endswith((".txt", ".csv")):
        found = _from_list(source, labels)
    else:
        if not storage.exists(source):
            raise DataError("no such folder", where=source, fix="give a folder of images, or a .txt/.csv list")
        found = [
            Listed(uri, size, _folder_name(uri) if labels == "folder" else None)
            for uri, size in storage.list_files(source)
            if uri.lower().endswith(SUFFIXES)
        ]
    if not found:
        raise DataError("no images found", where=source, expected=f"files ending in {', '.join(SUFFIXES)}")
    return found


def _from_list(source: str, labels: Labels) -> list[Listed]:
    try:
        text = storage.read_bytes(source).decode("utf-8-sig")  # spreadsheets begin their exports with a mark
    except FileNotFoundError:
        raise DataError("no such list", where=source) from None
    except UnicodeDecodeError as error:
        raise DataError(f"the list is not UTF-8 text: {error}", where=source) from None
    if source.endswith(".txt") and labels != "list":
        text = "\n".join(f'"{line.replace(QUOTE, 2 * QUOTE)}"' for line in text.splitlines() if line.strip())
    reader = csv.reader(io.StringIO(text))
    lines = []
    try:
        for line in reader:
            if not line or not line[0].strip():
                continue
            if labels == "list" and len(line) < 2:
                raise DataError("line has no label", where=f"{source}:{reader.line_num}", expected="URI,label")
            lines.append(line)
    except csv.Error as error:
        raise DataError(f"not a list of images: {error}", where=f"{source}:{reader.line_num}") from None
    folder = source.rpartition("/")[0]
    return sorted(
        (Listed(storage.join(folder, line[0].strip()), 0, _label(line, labels)) for line in lines), key=_by_uri
    )


def _label(line: Sequence[str], labels: Labels) -> str | None:
    if labels == "list":
        return line[1].strip()
    return _folder_name(line[0]) if labels == "folder" else None


def _folder_name(uri: str) -> str | None:
    """Name of the folder that holds a file."""
    parts = uri.split("/")
    return parts[-2] if len(parts) > 1 else None


def _by_uri(image: Listed) -> str:
    return image.uri


def _rows_per_shard(listed: Sequence[Listed], shard_bytes: int, unit_rows: int) -> int:
    """Whole units a shard; a list without sizes is taken at 100 KB an image."""
    total = sum(image.bytes for image in listed)
    mean = max(1, total // len(listed)) if total else 100_000
    return max(1, shard_bytes // (mean * unit_rows)) * unit_rows


def _run(specs: Sequence[Mapping[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    import ray.data

    frame = ray.data.from_items([dict(spec) for spec in specs], override_num_blocks=len(specs))
    try:
        rows = frame.map(_pack_one, fn_kwargs={"limits": limits}).take_all()
    except Exception as error:
        cause = root_cause(error)
        if cause is None:
            raise
        raise cause from error
    return [dict(row) for row in rows]


def _pack_one(spec: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """One task: read, check and write one shard."""
    kept: list[ImageRow] = []
    rejected: list[dict[str, str]] = []
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for uri, label, data in zip(spec["uris"], spec["labels"], pool.map(_read, spec["uris"]), strict=True):
            verdict = decode(data, limits)
            if isinstance(verdict, Rejected):
                rejected.append({"uri": uri, "reason": verdict.reason, "detail": verdict.detail})
            else:
                assert data is not None
                kept.append(ImageRow(data, None if label < 0 else int(label), uri))
    shard = Shard("", "parquet", "", 0, ())
    if kept:
        shard = write_shard(spec["folder"], int(spec["index"]), kept, int(spec["unit_rows"]))
    return {"index": int(spec["index"]), "shard": asdict(shard), "rejected": rejected}


def _read(uri: str) -> bytes | None:
    """The bytes; None when the file is gone since it was listed."""
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None


def _reasons(rejected: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(e["reason"] for e in rejected).most_common())


def _write_rejected(folder: str, rejected: Sequence[Mapping[str, str]]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(entry) for entry in rejected]), buffer)
    storage.write_bytes(storage.join(folder, REJECTED_NAME), buffer.getvalue())
