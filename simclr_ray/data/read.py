"""Read the rows of a unit: a range read of one row group, or of a few for a shared unit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece
from simclr_ray.errors import DataError, StorageError


def read_rows(manifest: Manifest, pieces: Sequence[Piece], columns: Sequence[str]) -> pa.Table:
    """Rows of the pieces in their stored order, with a `sample_id` column.

    Raises:
        DataError: naming the shard, when it is missing, broken, changed or lacks a column.
    """
    tables = []
    for piece in pieces:
        uri = manifest.shard_uri(piece.shard)
        expected = manifest.shards[piece.shard]
        try:
            parquet = _open(uri, expected.etag, expected.bytes)
            present = parquet.schema_arrow.names
            missing = [name for name in columns if name not in present]
            if missing:
                raise DataError(
                    f'no column "{missing[0]}"', where=uri, got=", ".join(present), fix="pack the images again"
                )
            group = parquet.read_row_group(piece.group, columns=list(columns), use_threads=False)
        except FileNotFoundError:
            raise DataError(
                "shard is gone, but was in the manifest", where=uri, fix="restore it, or pack the images again"
            ) from None
        except OSError as error:
            # Arrow reports damaged pages as OSError too; the store's own errors have a number or say AWS.
            if error.errno is not None or "AWS Error" in str(error):
                raise StorageError(f"cannot be read: {error}", where=uri, fix="check the store, run again") from None
            raise DataError(f"shard cannot be read: {error}", where=uri, fix="restore it from its source") from None
        except (pa.ArrowInvalid, IndexError) as error:
            raise DataError(f"shard cannot be read: {error}", where=uri, fix="restore it from its source") from None
        if group.num_rows != expected.rows_per_group[piece.group]:
            raise DataError(
                f"row group {piece.group} changed since the manifest was written",
                where=uri,
                got=f"{group.num_rows} rows",
                expected=f"{expected.rows_per_group[piece.group]}",
                fix="pack the images again and start a new run",
            )
        ids = pa.array(np.arange(piece.stop - piece.start, dtype=np.int64) + piece.first_sample_id)
        tables.append(group.slice(piece.start, piece.stop - piece.start).append_column("sample_id", ids))
    return pa.concat_tables(tables)


@lru_cache(maxsize=8)
def _open(uri: str, etag: str, size: int) -> pq.ParquetFile:
    """A few open files a process, so that a footer is not read again for each unit; `etag` keeps versions apart.

    Raises:
        DataError: when the file is not of the size it was written with, which is known without reading it.
    """
    del etag
    files, path = storage.filesystem(uri)
    source = files.open_input_file(path)
    if source.size() != size:
        raise DataError(
            "shard changed since the manifest was written",
            where=uri,
            got=f"{source.size()} bytes",
            expected=f"{size}",
            fix="restore it, or pack the images again and start a new run",
        )
    return pq.ParquetFile(source)
