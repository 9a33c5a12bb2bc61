"""Write canonical shards: Parquet with the original image bytes, one row group a unit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.data.footer import seal
from simclr_ray.data.manifest import MANIFEST_NAME, UNIT_ROWS, Shard, shard_from_file
from simclr_ray.data.plan import PACK_DOMAIN, permutation
from simclr_ray.errors import ConfigError

SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.int32()), ("uri", pa.string())])


@dataclass(frozen=True)
class ImageRow:
    """One image as it is stored."""

    image: bytes
    label: int | None
    uri: str


def write_shard(folder: str, index: int, rows: Sequence[ImageRow], unit_rows: int = UNIT_ROWS) -> Shard:
    """Write one shard and describe it for the manifest.

    Image bytes are already compressed, so the file is not; and dictionaries or statistics over them would only cost.
    Pages and the footer have checksums, for no other covers a row group that is read alone.
    """
    table = pa.table(
        {
            "image": [row.image for row in rows],
            "label": [row.label for row in rows],
            "uri": [row.uri for row in rows],
        },
        schema=SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, row_group_size=unit_rows, compression="none", use_dictionary=False, write_statistics=False,
        write_page_checksum=True,
    )  # fmt: skip
    data = seal(buffer.getvalue())
    name = f"shard-{index:05d}.parquet"
    version = storage.write_bytes(storage.join(folder, name), data)
    groups = [min(unit_rows, len(rows) - start) for start in range(0, len(rows), unit_rows)]
    return shard_from_file(name, data, groups, version=version)


def refuse_non_empty(folder: str) -> None:
    """A data set is written into an empty folder only.

    Raises:
        ConfigError: when something is there already.
    """
    names = storage.list_names(folder)
    if names:
        what = "a packed data set is here already" if MANIFEST_NAME in names else "the folder is not empty"
        raise ConfigError(what, where=folder, got=", ".join(names[:3]), fix="choose another folder, or delete this one")


def shuffled(count: int, seed: int) -> np.ndarray:
    """The order in which images go into shards: a permutation by seed, uint32 (count,)."""
    return permutation(count, seed=seed, epoch=0, unit=0, domain=PACK_DOMAIN)
