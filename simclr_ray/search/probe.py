"""The images by which every checkpoint of a search is measured: read once, the same views of them for all trials.

Views are drawn from the policy of the given configuration, never from a trial's own: a trial that trains on gentle
views would otherwise be asked gentle questions. Rows are taken from all over the data set, none twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.read import RowRange, read_range, resolve
from simclr_ray.errors import DataError
from simclr_ray.evaluate.encode import Image
from simclr_ray.views.apply import central_view, two_views
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import Policy

_ROWS_AT_ONCE = 256
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ProbeSet:
    """What an encoder is measured on."""

    images: Image
    """Central views, (n, S, S, 3) uint8."""
    views: Image
    """Random views of the same, (n, q, S, S, 3) uint8."""
    labels: Labels | None
    """(n,); None where the data set has none."""
    voters: Image
    """Central views of other images, (m, S, S, 3) uint8; none without labels."""
    voters_labels: Labels
    """(m,)."""


def read_probe(
    manifest: Manifest, policy: Policy, limits: Limits, *, images: int, voters: int, views: int, seed: int
) -> ProbeSet:
    """Read the images of a search.

    Args:
        manifest: Of their data set.
        policy: The given configuration's.
        limits: What is decoded at all.
        images: Images to measure, at most; fewer where the data set is small.
        voters: Further images that vote, read where there are labels; 0 leaves labels aside.
        views: Views of each image that is measured.
        seed: Of the choice of rows and of the views.

    Raises:
        DataError: fewer than two images decode, or labelled ones leave none that vote.
    """
    found, labels, ids = _read(manifest, limits, images, voters, seed)
    if len(found) < 2:
        raise DataError("measuring needs two images that decode", where=manifest.folder, got=len(found))
    known = labels if voters and (labels >= 0).all() else None
    size = min(images, len(found) if known is None else max(2, len(found) // 2))
    if known is not None and len(found) - size < 1:
        raise DataError(
            "no image is left that could vote", where=manifest.folder, got=f"{len(found)} images",
            expected="some more than objective.images",
        )  # fmt: skip
    measured, rest = found[:size], found[size:] if known is not None else []
    none: Image = np.empty((0, policy.size, policy.size, 3), np.uint8)
    return ProbeSet(
        images=_central(measured, policy),
        views=_views(measured, ids[:size], policy, views, seed),
        labels=None if known is None else known[:size],
        voters=_central(rest, policy) if rest else none,
        voters_labels=np.empty(0, np.int64) if known is None else known[size:],
    )


def read_originals(manifest: Manifest, limits: Limits, count: int, seed: int) -> tuple[list[Image], Labels]:
    """Some decoded images of a data set, and their sample ids."""
    found, _, ids = _read(manifest, limits, count, 0, seed)
    return found, ids


def _read(
    manifest: Manifest, limits: Limits, images: int, voters: int, seed: int
) -> tuple[list[Image], Labels, Labels]:
    """Decoded images, their labels (-1: none) and ids; without labels only `images` of them."""
    found: list[Image] = []
    labels: list[int] = []
    ids: list[int] = []
    wanted = images + voters
    columns = [manifest.image_column, "label"]
    for rows in _spread(manifest, seed):
        table = read_range(rows, columns, manifest.image_column)
        for encoded, label, sample_id in zip(
            table[manifest.image_column].to_pylist(), _labels(table), table["sample_id"].to_pylist(), strict=True
        ):
            image = decode(encoded, limits)
            if not isinstance(image, Rejected):
                found.append(image)
                labels.append(label)
                ids.append(sample_id)
        if labels and min(labels) < 0:
            wanted = images
        if len(found) >= wanted:
            break
    return found[:wanted], np.array(labels[:wanted], np.int64), np.array(ids[:wanted], np.int64)


def _labels(table: pa.Table) -> list[int]:
    column = table["label"]
    if column.null_count or not pa.types.is_integer(column.type):
        return [-1] * len(table)
    return [int(label) for label in column.to_pylist()]


def _spread(manifest: Manifest, seed: int) -> Iterator[RowRange]:
    """Groups of rows, the first of each shard, then the second of each; shards in an order drawn by the seed."""
    first_ids = manifest.first_sample_ids()
    order = np.random.default_rng(seed).permutation(len(first_ids)).tolist()
    for group in count():
        left = False
        for shard in order:
            sizes = manifest.table.groups_of(shard)
            if group >= len(sizes):
                continue
            left = True
            if rows := min(int(sizes[group]), _ROWS_AT_ONCE):
                first = int(first_ids[shard]) + int(sizes[:group].sum())
                yield resolve(manifest, Piece(shard, group, 0, rows, first))
        if not left:
            return


def _central(images: list[Image], policy: Policy) -> Image:
    parts = [central_view(images[i : i + _ROWS_AT_ONCE], policy) for i in range(0, len(images), _ROWS_AT_ONCE)]
    return np.concatenate(parts)


def _views(images: list[Image], ids: Labels, policy: Policy, views: int, seed: int) -> Image:
    """(n, q, S, S, 3); two views come from one address, so an odd number leaves one out."""
    sizes = np.array([image.shape[:2] for image in images])
    pairs = [
        two_views(images, draw(policy, seed=seed, epoch=epoch, sample_ids=ids, sizes=sizes), policy)
        for epoch in range(-(-views // 2))
    ]
    return np.concatenate(pairs, axis=1)[:, :views]
