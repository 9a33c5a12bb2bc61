"""Pack images into canonical shards and a manifest, by Ray tasks that write one shard each.

The source is indexed first (`data/index.py`): whatever it is, it becomes rows in a known order. Runs of rows are
permuted by seed and dealt to output shards (`data/pack_order.py`), so that a training run only has to permute units.
A task reads its rows, checks that they decode, writes its shard, and then a note that it is done; a pack that was
killed goes on with the shards that have no note, and ends with the same bytes as one that was not. The manifest is
written last, and what only the work needed is removed.

Images that do not decode, shards that cannot be read and, if wanted, duplicates are left out, counted, and listed in
`rejected.parquet` and `duplicates.parquet`; no other row is.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data import dedupe, tasks
from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.duplicates import LARGEST_DISTANCE, NO_DUPLICATES
from simclr_ray.data.index import REJECTED_SCHEMA, IndexOptions, build, survey
from simclr_ray.data.inputs import Columns, Row, columns_of, read_inputs
from simclr_ray.data.manifest import (
    MANIFEST_NAME,
    UNIT_ROWS,
    Manifest,
    Shard,
    read_manifest,
    unit_rows_for,
    write_manifest,
)
from simclr_ray.data.pack_order import PackOrder
from simclr_ray.data.plan import PACK_DOMAIN, permutation
from simclr_ray.data.read import RowRange, object_bytes, resolve
from simclr_ray.data.shards import ImageRow, write_shard
from simclr_ray.data.shrink import Shrink, Stored, shrink
from simclr_ray.data.sources import Labels, SourceKind, state_of
from simclr_ray.data.work import HASHES, INDEX, PARTS, REJECTED_NAME, SOURCE_STATE, claim, finish
from simclr_ray.errors import ConfigError, DataError

_READERS = 32
_MOST_SHARDS = 2
"""A task's shard ends at so many times its wanted size, and another one follows: it is held in memory until then."""


@dataclass(frozen=True)
class PackReport:
    """What `pack` did."""

    manifest: Manifest
    rejected: Mapping[str, int]
    """Reason -> images left out, and shards left out or used in part."""
    duplicates: int = 0
    """Images left out because they are there already."""
    encoded_anew: int = 0
    """Images that were made smaller or encoded anew."""

    @property
    def num_rejected(self) -> int:
        """Images and shards left out, duplicates not among them."""
        return sum(self.rejected.values())


@dataclass(frozen=True)
class _Rewrite:
    """What a task does with its rows, the same for all."""

    folder: str
    unit_rows: int
    limits: Limits
    shrink: Shrink | None
    columns: Columns
    seed: int | None
    """Of the order inside a shard; None keeps that of the rows."""
    tasks: int
    """Of the whole pack, each of which writes one shard, or several where images are far larger than their mean."""
    most_bytes: int
    """Images that a task holds at a time, about."""


def pack(
    source: str,
    destination: str,
    *,
    labels: Labels = "none",
    seed: int = 0,
    shard_bytes: int = 256 << 20,
    unit_rows: int | None = None,
    limits: Limits | None = None,
    kind: SourceKind | None = None,
    column: str | None = None,
    label_column: str = "label",
    encode: Shrink | None = None,
    deduplicate: dedupe.Deduplicate = "none",
    distance: int = 4,
    ray_ready: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> PackReport:
    """Pack the images of `source` into `destination`.

    Args:
        source: Folder (local or object store, searched recursively) of images, tars or Parquet files; a packed or
            indexed data set; one tar or Parquet file; or a list, as .txt or .csv with one URI a line and, for
            `labels="list"`, the label after a comma, or as .parquet with a column `uri`, `url` or `path`.
        destination: Empty or absent folder for the data set, or one in which the same pack was begun.
        labels: Where labels come from: nowhere, the name of an image's folder, the list, or the source's own shards.
            Those of a data set are kept.
        seed: Address of the shuffle.
        shard_bytes: Wanted size of a shard.
        unit_rows: Rows of a unit; None chooses: 64, fewer for a small data set (`unit_rows_for`).
        limits: What an image may be.
        kind: Take only files of this kind; None finds out what the source is.
        column: Column of the images, or of a list's addresses, where it cannot be told.
        label_column: Column of a Parquet file that holds its labels.
        encode: Make images smaller; None keeps their bytes.
        deduplicate: Leave out images whose bytes are equal (`exact`), or also those that show the same picture
            (`near`).
        distance: Most bits in which the hashes of the same picture differ.
        ray_ready: Makes a context in which Ray is connected; entered once source and destination are found good.

    Raises:
        DataError: nothing to read, or no image among it.
        ConfigError: the destination is not empty, another pack was begun there, or the source is ambiguous.
    """
    source, destination = storage.normalise(source), storage.normalise(destination)
    if source == destination:
        raise ConfigError("source and destination are the same folder", where=source)
    if not 0 <= distance <= LARGEST_DISTANCE:
        raise ConfigError("the distance of duplicates", got=distance, expected=f"0 to {LARGEST_DISTANCE} bits")
    options = IndexOptions(kind, column, labels, label_column, seed, unit_rows or UNIT_ROWS)
    limits = limits or Limits()
    settings = {"verb": "pack", "source": source, SOURCE_STATE: state_of(source, kind)} | asdict(options)
    settings |= {"unit_rows": unit_rows, "shard_bytes": shard_bytes, "deduplicate": deduplicate, "distance": distance}
    settings |= {"limits": asdict(limits), "encode": asdict(encode) if encode else None}
    claimed = claim(destination, settings)
    if claimed.begun and storage.exists(storage.join(destination, MANIFEST_NAME)):
        finish(destination)  # killed after its last write
        return _report(read_manifest(destination))
    folder = storage.join(destination, INDEX)
    found = survey(source, folder, options, claimed)
    with ray_ready():
        indexed = build(found, source, folder, options)
        unit_rows = unit_rows or unit_rows_for(indexed.rows)
        own = indexed.folder != folder  # a data set, whose labels are known
        columns = columns_of(indexed, label_column if own or labels != "none" else None)
        rows_each = _rows_per_shard(indexed, shard_bytes, unit_rows, encode)
        hashes, duplicates = storage.join(destination, HASHES), NO_DUPLICATES
        if deduplicate != "none":
            duplicates = dedupe.duplicates_of(
                indexed, columns, hashes, how=deduplicate, distance=distance, limits=limits, rows_per_task=rows_each
            )
        # Lists of loose images are in an order by seed already.
        shuffle = None if not own and "seed" in indexed.source else seed
        order = PackOrder(indexed, rows_each, seed=shuffle)
        rewrite = _Rewrite(
            destination, unit_rows, limits, encode, columns, shuffle, len(order), _MOST_SHARDS * shard_bytes
        )
        parts = _written(indexed, order, duplicates.dropped, rewrite)
    if deduplicate != "none":
        dedupe.write_report(duplicates, hashes, destination, rows_each)
    about = {"source": source, "seed": seed, "files": indexed.rows, "duplicates": len(duplicates.dropped)}
    return _committed(destination, indexed, parts, unit_rows, about)


def _rows_per_shard(indexed: Manifest, shard_bytes: int, unit_rows: int, encode: Shrink | None) -> int:
    """Whole units a shard, by the mean size of an image."""
    listed = len(indexed.table) > 0 and indexed.table.text("kind", 0) == "objects"
    mean = object_bytes(indexed) if listed else max(1, int(indexed.table.bytes.sum()) // max(1, indexed.rows))
    if encode is not None:  # a JPEG of quality 90 has about a quarter of a byte a pixel, and 4:3 is usual
        mean = max(1, min(mean, encode.short_side**2 // 3))
    return max(1, shard_bytes // (mean * unit_rows)) * unit_rows


def _written(indexed: Manifest, order: PackOrder, dropped: np.ndarray, rewrite: _Rewrite) -> list[dict[str, Any]]:
    """Notes of all output shards, after writing those that have none yet."""
    notes = storage.join(rewrite.folder, PARTS)
    done = set(storage.list_names(notes))

    def calls() -> Iterator[tuple[int, list[RowRange], list[int]]]:
        for number in range(len(order)):
            if _note_name(number) not in done:
                ranges = [resolve(indexed, piece) for piece in order.pieces(number)]
                yield number, ranges, _among(dropped, ranges)

    parts = list(tasks.run(pack_one, calls(), common=(rewrite,)))
    with ThreadPoolExecutor(_READERS, thread_name_prefix="parts") as pool:
        read = pool.map(lambda name: json.loads(storage.read_bytes(storage.join(notes, name))), sorted(done))
        return sorted([*parts, *read], key=lambda part: int(part["index"]))


def _note_name(number: int) -> str:
    return f"shard-{number:05d}.json"


def _among(dropped: np.ndarray, ranges: Sequence[RowRange]) -> list[int]:
    """Which of the dropped ids, given in rising order, are in the ranges."""
    out: list[int] = []
    for one in ranges:
        first, last = np.searchsorted(dropped, [one.first_sample_id, one.first_sample_id + one.rows])
        out += dropped[first:last].tolist()
    return out


def pack_one(number: int, ranges: Sequence[RowRange], dropped: Sequence[int], rewrite: _Rewrite) -> dict[str, Any]:
    """One task: read, check and write one shard, then note that it is done.

    Where the images are so much larger than their mean that they would fill `rewrite.most_bytes`, the shard ends after
    a whole unit and the rest follows in further ones, numbered after those of all other tasks.
    """
    kept: list[ImageRow] = []
    shards: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    away, encoded_anew, held, largest = set(dropped), 0, 0, -1

    def write() -> None:
        nonlocal held
        shards.append(asdict(_write(number + len(shards) * rewrite.tasks, kept, rewrite)))
        kept.clear()
        held = 0

    for row in read_inputs(ranges, rewrite.columns):
        if row.sample_id in away:
            continue
        stored = _checked(row, rewrite)
        if isinstance(stored, Stored):
            kept.append(ImageRow(stored.data, row.label, row.uri))
            encoded_anew += stored.encoded_anew
            held += len(stored.data)
            largest = max(largest, -1 if row.label is None else row.label)
        else:
            rejected.append(stored)
        if held >= rewrite.most_bytes and len(kept) % rewrite.unit_rows == 0:
            write()
    if kept:
        write()
    note = {"index": number, "shards": shards, "rejected": rejected, "encoded_anew": encoded_anew, "largest": largest}
    storage.write_bytes(storage.join(rewrite.folder, PARTS, _note_name(number)), json.dumps(note).encode())
    return note


def _write(number: int, rows: Sequence[ImageRow], rewrite: _Rewrite) -> Shard:
    """Write rows as a shard, in an order by seed if that is wanted."""
    if rewrite.seed is not None:
        order = permutation(len(rows), seed=rewrite.seed, epoch=0, unit=number + 1, domain=PACK_DOMAIN)
        rows = [rows[i] for i in order]
    return write_shard(rewrite.folder, number, rows, rewrite.unit_rows)


def _checked(row: Row, rewrite: _Rewrite) -> Stored | dict[str, str]:
    """An image as it is stored, or the entry of `rejected.parquet`."""
    if row.lost:
        return {"uri": row.uri, "reason": row.lost, "detail": "could not be read"}
    if rewrite.shrink is not None:
        made = shrink(row.image, rewrite.limits, rewrite.shrink)
    else:
        verdict = decode(row.image, rewrite.limits)
        made = verdict if isinstance(verdict, Rejected) else Stored(row.image or b"", encoded_anew=False)
    if isinstance(made, Rejected):
        return {"uri": row.uri, "reason": made.reason, "detail": made.detail}
    return made


def _committed(
    destination: str, indexed: Manifest, parts: Sequence[Mapping[str, Any]], unit_rows: int, about: dict[str, Any]
) -> PackReport:
    """Write what was left out, then the manifest, and remove what the work needed.

    Raises:
        DataError: nothing is left.
    """
    shards = tuple(Shard(**shard) for part in parts for shard in part["shards"])
    rejected = Counter(entry["reason"] for part in parts for entry in part["rejected"])
    if not shards:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
        raise DataError(f"none of {indexed.rows:,} files is an image", where=str(about["source"]), got=reasons)
    rejected += _write_rejected(destination, parts)
    largest = max(int(part["largest"]) for part in parts)
    classes = indexed.classes or tuple(str(number) for number in range(largest + 1))
    about |= {"rejected": dict(rejected), "encoded_anew": sum(int(part["encoded_anew"]) for part in parts)}
    about |= {name: indexed.source[name] for name in ("licence",) if name in indexed.source}
    write_manifest(Manifest(destination, shards, unit_rows=unit_rows, classes=classes, source=about))
    finish(destination)
    return _report(read_manifest(destination))


def _report(manifest: Manifest) -> PackReport:
    about = manifest.source
    return PackReport(manifest, about["rejected"], int(about["duplicates"]), int(about["encoded_anew"]))


def _write_rejected(destination: str, parts: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Write `rejected.parquet`, of shards and of images, if there is any; the reasons of the shards."""
    try:
        data = storage.read_bytes(storage.join(destination, INDEX, REJECTED_NAME))
        shards = pq.read_table(io.BytesIO(data))
    except FileNotFoundError:
        shards = REJECTED_SCHEMA.empty_table()
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, REJECTED_SCHEMA) as writer:
        writer.write_table(shards)
        for part in parts:
            writer.write_table(pa.Table.from_pylist(part["rejected"], schema=REJECTED_SCHEMA))
    if len(shards) or any(part["rejected"] for part in parts):
        storage.write_bytes(storage.join(destination, REJECTED_NAME), buffer.getvalue())
    return Counter(shards["reason"].to_pylist())
