"""From labelled shards to evaluation images, and from images to embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from simclr_ray.config import Config
from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.inputs import columns_of, read_inputs
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece, Plan, UnitTable
from simclr_ray.data.read import RowRange, read_range, resolve
from simclr_ray.data.units import BYTES_AHEAD, read_ahead
from simclr_ray.errors import DataError, StorageError
from simclr_ray.model.batch_norm import calibrating
from simclr_ray.model.encoder import Encoder
from simclr_ray.model.simclr import SimCLR
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.build import build_model
from simclr_ray.train.derive import policy_of
from simclr_ray.train.run import open_existing
from simclr_ray.views.apply import central_view, normalise, two_views
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import Policy

Image = npt.NDArray[np.uint8]

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder with what it needs to see an image as it did in training."""

    model: SimCLR
    """In evaluation mode; `model.encoder` is the plain module to build on."""
    policy: Policy
    """Size and normalisation of its input."""
    step: int
    """Optimizer steps it was trained for."""
    has_projector: bool = True
    """Whether the projector was trained too; imported weights may come without one."""

    @property
    def width(self) -> int:
        """Length D of an embedding."""
        return cast(Encoder, self.model.encoder).embedding_dim

    def embed(self, images: Sequence[Image]) -> Tensor:
        """Embeddings h of decoded images.

        Args:
            images: (H, W, 3) uint8 each, of any sizes.

        Returns:
            (n, D) float32 on the CPU.
        """
        return embed(self.model.embed, central_view(images, self.policy), self.policy)


@dataclass(frozen=True)
class LabelledSet:
    """A decoded data set at evaluation size."""

    views: Image
    """Central views, (n, S, S, 3) uint8."""
    labels: Tensor
    """(n,) int64."""
    pairs: Image
    """Two random views of the first images, (p, 2, S, S, 3) uint8."""
    rejected: int
    """Images that did not decode."""


def load_encoder(run: str, step: int | None = None) -> TrainedEncoder:
    """Load what a run learned.

    Args:
        run: The run folder, local or s3://.
        step: Of a checkpoint; the newest valid one without it.

    Raises:
        ConfigError: no run here.
        StorageError: the run has no valid checkpoint, or not this one.
    """
    folder, config = open_existing(run)
    if step is None:
        found = ckpt.load_newest(folder.checkpoints, warn=lambda text: None)
        if found is None:
            raise StorageError("the run has no checkpoint yet", where=folder.uri, fix="run pretrain first")
    else:
        try:
            found = ckpt.load(folder.checkpoints, step)
        except ckpt.InvalidCheckpoint as error:
            have = ", ".join(map(str, ckpt.committed_steps(folder.checkpoints))) or "none"
            raise StorageError(f"no valid checkpoint of step {step}: {error}", where=folder.uri, got=have) from None
    model = build_model(config)
    model.load_state_dict(found.model)
    has_projector = (folder.info() or {}).get("projector") != "none"
    return TrainedEncoder(model.eval(), policy_of(config.views), found.step, has_projector)


def random_encoder(config: Config, views: Image, policy: Policy) -> SimCLR:
    """The model before training, with batch-norm statistics of real images: the honest baseline.

    With the initial statistics (mean 0, variance 1) an untrained network would be judged on numbers of the wrong
    scale; a few hundred images set them right without teaching anything.
    """
    model = build_model(config)
    with calibrating(model):
        for rows in row_slices(len(views[: 8 * ROWS_AT_ONCE])):
            if rows.stop - rows.start > 1:  # a rest of one image has no variance
                model(normalise(torch.from_numpy(views[rows]), policy))
    return model.eval()


def embed(encode: Callable[[Tensor], Tensor], views: Image, policy: Policy) -> Tensor:
    """Run a function over views batch by batch: (n, S, S, 3) uint8 -> (n, D) float32."""
    with torch.inference_mode():
        parts = [encode(normalise(torch.from_numpy(views[rows]), policy)).float() for rows in row_slices(len(views))]
    return torch.cat(parts)


def pixels(views: Image, policy: Policy) -> Tensor:
    """Raw pixels as a representation: (n, d) in [0, 1], gray where the images are, at most 32 x 32."""
    if policy.size > 32:
        small = policy.model_copy(update={"size": 32, "central_fraction": 1.0})
        views = np.concatenate([central_view(list(views[rows]), small) for rows in row_slices(len(views))])
    gray = bool((views[..., :1] == views).all())
    chosen = views[..., :1] if gray else views
    return torch.from_numpy(np.ascontiguousarray(chosen)).flatten(1).float() / 255


def read_labelled(manifest: Manifest, policy: Policy, limits: Limits, *, num_pairs: int, seed: int) -> LabelledSet:
    """Decode a whole labelled data set to evaluation size, and two views of its first images.

    Raises:
        DataError: no labels, or nothing that decodes.
    """
    views: list[Image] = []
    labels: list[npt.NDArray[np.int64]] = []
    pairs: list[Image] = []
    no_pairs: Image = np.empty((0, 2, policy.size, policy.size, 3), np.uint8)
    rejected = 0
    for images, group_labels, ids, bad in _groups(manifest, limits):
        rejected += bad
        if not images:
            continue
        views.append(central_view(images, policy))
        labels.append(group_labels)
        missing = num_pairs - sum(map(len, pairs))
        if missing > 0:
            sizes = np.array([image.shape[:2] for image in images[:missing]])
            draws = draw(policy, seed=seed, epoch=0, sample_ids=ids[:missing], sizes=sizes)
            pairs.append(two_views(images[:missing], draws, policy))
    if not views:
        raise DataError("no image of the data set decodes", where=manifest.folder)
    return LabelledSet(
        np.concatenate(views), torch.from_numpy(np.concatenate(labels)), np.concatenate(pairs or [no_pairs]), rejected
    )


def _groups(
    manifest: Manifest, limits: Limits
) -> Iterator[tuple[list[Image], npt.NDArray[np.int64], npt.NDArray[np.int64], int]]:
    """Images, labels and ids of some consecutive rows that decode, and how many of those between were rejected."""
    columns = [manifest.image_column, "label"]
    tables = read_ahead(
        row_ranges(manifest), lambda rows: read_range(rows, columns, manifest.image_column),
        cost=lambda rows: rows.bytes_about, max_cost=BYTES_AHEAD,
    )  # fmt: skip
    for table in tables:
        if table["label"].null_count:
            raise DataError(
                "the data set has no labels, which the probes need", where=manifest.folder,
                fix="give labelled sets in evaluate.train and evaluate.test",
            )  # fmt: skip
        if not pa.types.is_integer(table["label"].type):
            raise DataError(
                'the column "label" holds no numbers', where=manifest.folder, got=str(table["label"].type),
                fix="pack the images with labels, which numbers the classes",
            )  # fmt: skip
        encoded, labels = table[manifest.image_column], table["label"].to_numpy().astype(np.int64)
        ids = table["sample_id"].to_numpy()
        for rows in row_slices(len(table)):  # a row group of others may hold thousands
            decoded = [decode(data, limits) for data in encoded[rows].to_pylist()]
            good = [i for i, image in enumerate(decoded) if not isinstance(image, Rejected)]
            images = [image for image in decoded if not isinstance(image, Rejected)]
            yield images, labels[rows][good], ids[rows][good], len(decoded) - len(good)


def read_some(
    manifest: Manifest, limits: Limits, count: int, *, seed: int
) -> tuple[list[Image], npt.NDArray[np.int64] | None]:
    """Images of a data set that decode, at most `count`, by whole units in the order of a seed, and their labels.

    A set that has no more than `count` images gives all, in stored order.

    Returns:
        Decoded images, and labels (n,), -1 where an image has none, or None where the data set has no column of them.
    """
    columns = columns_of(manifest, "label")
    images, labels = list[Image](), list[int]()
    by_seed = ([resolve(manifest, piece) for piece in pieces] for pieces in units_by_seed(manifest, seed))
    ranges = [list(row_ranges(manifest))] if manifest.rows <= count else by_seed
    for row in (row for some in ranges for row in read_inputs(some, columns)):
        image = None if row.lost else decode(row.image, limits)
        if image is None or isinstance(image, Rejected):
            continue
        images.append(image)
        labels.append(-1 if row.label is None else row.label)
        if len(images) == count:
            break
    return images, np.array(labels, np.int64) if columns.label else None


def units_by_seed(manifest: Manifest, seed: int) -> Iterator[tuple[Piece, ...]]:
    """Each unit of a run's first epoch once, in its order; of a data set that fills none, its rows.

    So a few images of a packed bucket of any size are had by a few range reads, and are not those of one folder.
    """
    table = UnitTable(manifest)
    if table.num_units:
        plan = Plan(table, seed)
        yield from (plan.unit(index).pieces for index in range(table.num_units))
        return
    yield from ((piece,) for piece in _stored_groups(manifest))


def row_ranges(manifest: Manifest) -> Iterator[RowRange]:
    """Every group of the data set, in stored order."""
    return (resolve(manifest, piece) for piece in _stored_groups(manifest))


def _stored_groups(manifest: Manifest) -> Iterator[Piece]:
    for shard, first in enumerate(manifest.first_sample_ids().tolist()):
        for group, rows in enumerate(manifest.table.groups_of(shard).tolist()):
            if rows:
                yield Piece(shard, group, 0, rows, first)
            first += rows


def row_slices(count: int) -> list[slice]:
    """Runs of rows that are encoded together."""
    return [slice(start, min(count, start + ROWS_AT_ONCE)) for start in range(0, count, ROWS_AT_ONCE)]
