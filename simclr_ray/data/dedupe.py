"""Find the duplicates of a whole source, by Ray tasks that hash its images and one comparison in the driver.

A task hashes the rows of one range of the source and leaves a table; what is hashed is not hashed again after a kill.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data import tasks
from simclr_ray.data.decode import Limits
from simclr_ray.data.duplicates import Duplicates, find_duplicates, hash_of_bytes, same_bytes
from simclr_ray.data.inputs import Columns, read_inputs
from simclr_ray.data.listing import write_table
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.pack_order import PackOrder
from simclr_ray.data.read import RowRange, resolve

Deduplicate = Literal["none", "exact", "near"]
DUPLICATES_NAME = "duplicates.parquet"
_HASHED = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("hash", pa.uint64()), ("uri", pa.string())])


def hash_rows(ranges: Sequence[RowRange], note: str, columns: Columns, limits: Limits, near: bool) -> None:
    """Hash the images of some rows and write a table of them, in order."""
    digests, hashes, uris = [], [], []
    for row in read_inputs(ranges, columns):
        # What cannot be read equals nothing: its digest is that of its own number.
        digests.append(storage.digest(row.image if row.image is not None else f"row {row.sample_id}".encode()))
        hashes.append(hash_of_bytes(row.image, limits) if near and row.image is not None else None)
        uris.append(row.uri)
    halves = {
        "high": [int(digest[:16], 16) for digest in digests],
        "low": [int(digest[16:], 16) for digest in digests],
    }
    write_table(note, pa.table({**halves, "hash": hashes, "uri": uris}, schema=_HASHED))


def duplicates_of(
    manifest: Manifest, columns: Columns, folder: str, *, how: Deduplicate, distance: int, limits: Limits,
    rows_per_task: int,
) -> Duplicates:  # fmt: skip
    """Which rows of a source are dropped, in the order of its manifest.

    Args:
        manifest: Of the source.
        columns: As `inputs.columns_of` says.
        folder: For the tables of hashes.
        how: `exact` for equal bytes, `near` also for the same picture.
        distance: Most bits in which the hashes of the same picture differ.
        limits: What an image may be.
        rows_per_task: Rows that one task hashes.

    Raises:
        DataError: a shard is another one than was indexed.
        StorageError: the store fails.
    """
    order = PackOrder(manifest, rows_per_task, seed=None)
    done = set(storage.list_names(folder))
    calls = (
        ([resolve(manifest, piece) for piece in order.pieces(number)], storage.join(folder, _name(number)))
        for number in range(len(order)) if _name(number) not in done
    )  # fmt: skip
    for _ in tasks.run(hash_rows, calls, common=(columns, limits, how == "near")):
        pass
    # Column by column, for these are the largest arrays of all: digests are gone before hashes come.
    same = same_bytes(np.stack([_column(folder, len(order), half).to_numpy() for half in ("high", "low")], axis=1))
    marks = _column(folder, len(order), "hash")
    hashes = marks.fill_null(0).to_numpy() if how == "near" else None
    return find_duplicates(same, hashes, np.asarray(marks.is_valid()), distance)


def _column(folder: str, tables: int, name: str) -> pa.ChunkedArray:
    chunks = [chunk for number in range(tables) for chunk in _read(folder, number, [name])[name].chunks]
    return pa.chunked_array(chunks, _HASHED.field(name).type)


def write_report(found: Duplicates, folder: str, destination: str, rows_per_task: int) -> None:
    """Write `duplicates.parquet`: each image that is dropped, and the one that stays in its place.

    Columns: `kept` and `dropped` are positions in the order of the source, `kept_uri` and `dropped_uri` addresses,
    `distance` is 0 for equal bytes and else the bits in which the hashes differ.
    """
    kept = dict(_uris(np.unique(found.kept), folder, rows_per_task))
    dropped = dict(_uris(found.dropped, folder, rows_per_task))
    table = pa.table(
        {
            "kept": found.kept,
            "kept_uri": [kept[int(row)] for row in found.kept],
            "dropped": found.dropped,
            "dropped_uri": [dropped[int(row)] for row in found.dropped],
            "distance": found.distance,
        }
    )
    write_table(storage.join(destination, DUPLICATES_NAME), table)


def _uris(rows: npt.NDArray[np.int64], folder: str, rows_per_task: int) -> Iterator[tuple[int, str]]:
    """Addresses of some rows, given in rising order."""
    for number in np.unique(rows // rows_per_task):
        uris = _read(folder, int(number), ["uri"])["uri"]
        first = int(number) * rows_per_task
        for row in rows[(rows >= first) & (rows < first + rows_per_task)]:
            yield int(row), uris[int(row) - first].as_py()


def _read(folder: str, number: int, columns: list[str]) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, _name(number)))), columns=columns)


def _name(number: int) -> str:
    return f"hashes-{number:06d}.parquet"
