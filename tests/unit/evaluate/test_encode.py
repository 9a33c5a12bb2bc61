"""Labelled data sets are read for evaluation from every kind of shard."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest, shard_from_file
from simclr_ray.data.shards import ImageRow
from simclr_ray.errors import DataError
from simclr_ray.evaluate.encode import LabelledSet, read_labelled
from simclr_ray.views.policy import preset
from tests.conftest import real_rows
from tests.unit.data.kinds import KINDS, as_parquet, as_tar

POLICY = preset("cifar", size=16)


def read(manifest: Manifest) -> LabelledSet:
    return read_labelled(manifest, POLICY, Limits(), num_pairs=20, seed=1)


@pytest.fixture(scope="module")
def rows() -> list[ImageRow]:
    """60 images, one of which is none."""
    rows = real_rows(60)
    return [*rows[:30], ImageRow(b"<html>", rows[30].label, "x"), *rows[31:]]


@pytest.fixture(scope="module")
def packed(rows: list[ImageRow], tmp_path_factory: pytest.TempPathFactory) -> LabelledSet:
    return read(as_parquet(str(tmp_path_factory.mktemp("packed")), rows))


def test_images_labels_and_pairs_are_those_that_decode(packed: LabelledSet, rows: list[ImageRow]) -> None:
    assert packed.rejected == 1
    assert packed.labels.tolist() == [row.label for row in rows[:30] + rows[31:]]
    assert packed.views.shape == (59, 16, 16, 3)
    assert packed.pairs.shape == (20, 2, 16, 16, 3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "parquet"])
def test_every_kind_of_shard_gives_the_same_set(
    tmp_path: Path, rows: list[ImageRow], packed: LabelledSet, kind: str
) -> None:
    other = read(KINDS[kind](str(tmp_path / kind), rows))
    assert other.labels.tolist() == packed.labels.tolist()
    np.testing.assert_array_equal(other.views, packed.views)
    np.testing.assert_array_equal(other.pairs, packed.pairs)
    assert other.rejected == 1


def test_a_tar_without_labels_is_refused(tmp_path: Path, rows: list[ImageRow]) -> None:
    manifest = as_tar(str(tmp_path), rows[:20])
    tar = Path(manifest.shard_uri(0))
    tar.write_bytes(tar.read_bytes().replace(b"00007.cls", b"00007.cl_"))
    blanked = tar.read_bytes()
    at = blanked.index(b"00007.cl_")
    header = bytearray(blanked[at : at + 512])
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    tar.write_bytes(blanked[:at] + bytes(header) + blanked[at + 512 :])
    with pytest.raises(DataError, match="the data set has no labels"):
        read(manifest)


@pytest.mark.parametrize(
    ("labels", "words"), [(None, 'no column "label"'), (pa.array(["cat", "dog"]), "holds no numbers.*string")]
)
def test_parquet_without_numbers_as_labels_is_refused(
    tmp_path: Path, rows: list[ImageRow], labels: Any, words: str
) -> None:
    columns = {"image": [row.image for row in rows[:2]]} | ({} if labels is None else {"label": labels})
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
    manifest = Manifest(str(tmp_path), [shard_from_file("a.parquet", buffer.getvalue(), [2])], unit_rows=2)
    with pytest.raises(DataError, match=words):
        read(manifest)


def test_gaps_between_the_groups_of_a_tar_are_not_read(
    tmp_path: Path, rows: list[ImageRow], packed: LabelledSet
) -> None:
    """A range of no images is what was too large to be read along."""
    manifest = as_tar(str(tmp_path), rows[:20])
    shard = manifest.shards[0]
    gap = replace(
        shard, rows_per_group=(*shard.rows_per_group, 0), offsets=(*shard.offsets, shard.offsets[-1] + 10**12)
    )
    assert read(replace(manifest, shards=[gap])).labels.tolist() == packed.labels.tolist()[:20]
