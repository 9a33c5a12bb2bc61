"""What a report shows of an encoder: a sample of images, their embeddings, a map of them, neighbours, the spectrum.

The sample is a few whole units of the data set in the order of a run's seed, so a bucket of any size costs the same few
range reads. Everything is computed on the CPU, from the newest checkpoint.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image as Pillow
from torch import Tensor

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.ranges import LostShard
from simclr_ray.data.read import read_range, resolve
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate.encode import Image, TrainedEncoder, embed, units_by_seed
from simclr_ray.evaluate.knn import nearest
from simclr_ray.observe.health import alignment, rankme, uniformity
from simclr_ray.train.derive import limits_of
from simclr_ray.views.apply import central_view
from simclr_ray.views.draw import draw
from simclr_ray.views.make import two_views
from simclr_ray.views.policy import Policy

UMAP_NEIGHBOURS = 15
SPECTRUM = 512
"""Singular values that are shown, at most."""


@dataclass(frozen=True)
class Sample:
    """Some images of a data set."""

    source: str
    """URI of the data set."""
    of: int
    """Images that it has."""
    views: Image
    """What the encoder is given, (n, S, S, 3) uint8: central views."""
    pairs: Image
    """Two random views of each, (n, 2, S, S, 3) uint8."""
    ids: npt.NDArray[np.int64]
    labels: tuple[int, ...] | None
    """A class number each; None for an unlabelled data set."""
    classes: tuple[str, ...]
    """Names by class number; may be empty."""

    def class_name(self, label: int) -> str:
        """Its name, or its number."""
        return self.classes[label] if 0 <= label < len(self.classes) else f"class {label}"


@dataclass(frozen=True)
class Look:
    """What an encoder makes of a sample."""

    sample: Sample
    step: int
    """Of the checkpoint."""
    components: npt.NDArray[np.float64]
    """Principal components of the embeddings on the unit sphere, (n, 4), fewer where there are fewer directions."""
    variance: tuple[float, ...]
    """Share of the whole variance that each component has."""
    umap: npt.NDArray[np.float64] | None
    """(n, 2), where it was asked for and there is one."""
    spectrum: tuple[float, ...]
    """Singular values of the embeddings, the greatest first and as 1."""
    queries: tuple[int, ...]
    """Images (rows of the sample) whose neighbours are shown."""
    neighbours: npt.NDArray[np.int64]
    """Rows of the sample nearest to each query, itself left out, (q, k)."""
    similarity: npt.NDArray[np.float64]
    """Cosine similarities of those, (q, k)."""
    rankme: float
    alignment: float
    uniformity: float


def sample_of(config: Config, policy: Policy, count: int) -> Sample:
    """Images to look at: of the labelled test set where one is named, else of the training images.

    Raises:
        DataError: the data set is gone or broken, or none of its images decodes.
    """
    uri = config.evaluate.test or config.data.train
    if uri is None:
        raise DataError("the run names no data set")
    manifest = read_manifest(storage.normalise(uri))
    limits = limits_of(config.data)
    views: list[Image] = []
    pairs: list[Image] = []
    ids: list[int] = []
    labels: list[int | None] = []
    for images, group_ids, group_labels in _units(manifest, config.run.seed, limits):
        wanted = slice(0, count - len(ids))
        images, group_ids = images[wanted], group_ids[wanted]
        sizes = np.array([image.shape[:2] for image in images])
        draws = draw(policy, seed=config.run.seed, epoch=0, sample_ids=np.array(group_ids), sizes=sizes)
        views.append(central_view(images, policy))
        pairs.append(two_views(images, draws, policy))
        ids += group_ids
        labels += group_labels[wanted]
        if len(ids) >= count:
            break
    if len(ids) < 2:
        raise DataError("a look at the embeddings needs two images", where=manifest.folder, got=len(ids))
    known = tuple(label for label in labels if label is not None)
    return Sample(
        manifest.folder, manifest.rows, np.concatenate(views), np.concatenate(pairs), np.array(ids),
        known if len(known) == len(ids) else None, manifest.classes,
    )  # fmt: skip


def look_at(
    encoder: TrainedEncoder, sample: Sample, *, queries: int = 10, neighbours: int = 8, umap: bool = False
) -> Look:
    """Embed a sample and measure it.

    Raises:
        ConfigError: UMAP is asked for and not installed.
    """
    h = embed(encoder.model.embed, sample.views, encoder.policy)
    pair_a, pair_b = (embed(encoder.model.embed, sample.pairs[:, view], encoder.policy) for view in (0, 1))
    components, variance = principal(torch.nn.functional.normalize(h, dim=1), 4)
    sigma = torch.linalg.svdvals(h.double())[:SPECTRUM]
    spectrum = tuple((sigma / sigma[0].clamp(min=1e-30)).tolist())
    rows = _queries(sample, queries)
    found, near = _neighbours(h, rows, min(neighbours, len(h) - 1))
    return Look(
        sample, encoder.step, components, variance, umap_of(h) if umap else None, spectrum,
        rows, found, near, rankme(h), alignment(pair_a, pair_b), uniformity(h),
    )  # fmt: skip


def principal(h: Tensor, count: int) -> tuple[npt.NDArray[np.float64], tuple[float, ...]]:
    """Principal components of (n, d) embeddings and their shares of the variance.

    The sign of each component is set so that its largest entry is positive, or machines would mirror each other's maps.
    """
    centred = (h.double() - h.double().mean(dim=0)).cpu()
    u, sigma, _ = torch.linalg.svd(centred, full_matrices=False)
    count = min(count, len(sigma))
    components = u[:, :count] * sigma[:count]
    peak = components.gather(0, components.abs().argmax(dim=0, keepdim=True))  # (1, count)
    components = components * torch.where(peak < 0, -1.0, 1.0)
    share = sigma.square() / sigma.square().sum().clamp(min=1e-30)
    return components.numpy(), tuple(share[:count].tolist())


def umap_class() -> Any:
    """`umap.UMAP`.

    Raises:
        ConfigError: it is not installed, or what is installed does not work.
    """
    try:
        return importlib.import_module("umap").UMAP
    except (ImportError, AttributeError) as error:
        raise ConfigError("a UMAP map needs umap-learn", got=f"{type(error).__name__}: {error}",
                          fix="install it with: pip install 'simclr-ray[umap]'") from None  # fmt: skip


def umap_of(h: Tensor) -> npt.NDArray[np.float64] | None:
    """UMAP (McInnes et al., arXiv 1802.03426) of (n, d) embeddings by cosine, with its usual settings: (n, 2).

    The same embeddings give the same map: its seed is fixed, for which it uses one thread. None where there is no map:
    of fewer than four embeddings, or of a collapsed encoder's.

    Raises:
        ConfigError: umap-learn is not installed.
    """
    make = umap_class()
    if len(h) < 4 or float((h - h[0]).abs().max()) == 0:
        return None
    fit = make(n_neighbors=min(UMAP_NEIGHBOURS, len(h) - 1), metric="cosine", random_state=0, n_jobs=1, init="pca")
    places = np.asarray(fit.fit_transform(h.float().cpu().numpy()), np.float64)
    return places if np.isfinite(places).all() else None


def encoded(image: Image, side: int | None = None) -> bytes:
    """An image for the page, made anew from its pixels: PNG up to 64 pixels, else JPEG; nothing of the original's file.

    Args:
        image: (H, W, 3) uint8.
        side: Longest side it may have; larger ones are made smaller.
    """
    picture = Pillow.fromarray(np.ascontiguousarray(image))
    if side is not None and max(picture.size) > side:
        picture.thumbnail((side, side), Pillow.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(picture.size) <= 64:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def sprite(images: Image, cell: int, columns: int) -> bytes:
    """Thumbnails of (n, S, S, 3) images side by side in one JPEG, `columns` a row, `cell` pixels each."""
    rows = -(-len(images) // columns)
    sheet = Pillow.new("RGB", (columns * cell, rows * cell))
    for i, image in enumerate(images):
        thumb = Pillow.fromarray(np.ascontiguousarray(image)).resize((cell, cell), Pillow.Resampling.BICUBIC)
        sheet.paste(thumb, (i % columns * cell, i // columns * cell))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _units(manifest: Manifest, seed: int, limits: Limits) -> Iterator[tuple[list[Image], list[int], list[int | None]]]:
    """Images that decode, with ids and labels, unit by unit; units of lost shards are passed over."""
    for pieces in units_by_seed(manifest, seed):
        images: list[Image] = []
        ids: list[int] = []
        labels: list[int | None] = []
        for piece in pieces:
            try:
                table = _read(manifest, piece)
            except LostShard:
                continue
            known = table["label"].to_pylist() if "label" in table.column_names else [None] * len(table)
            rows = zip(table[manifest.image_column].to_pylist(), table["sample_id"].to_pylist(), known, strict=True)
            for data, sample_id, label in rows:
                image = decode(data, limits)
                if not isinstance(image, Rejected):
                    images.append(image)
                    ids.append(sample_id)
                    labels.append(label if isinstance(label, int) else None)
        if images:
            yield images, ids, labels


def _read(manifest: Manifest, piece: Piece) -> pa.Table:
    """Images with their labels, where they have some: a foreign table may lack the column."""
    rows = resolve(manifest, piece)
    try:
        return read_range(rows, [manifest.image_column, "label"], manifest.image_column)
    except DataError:
        return read_range(rows, [manifest.image_column], manifest.image_column)


def _queries(sample: Sample, count: int) -> tuple[int, ...]:
    """The first image of each class, or the first images: nobody has chosen them by their neighbours."""
    if sample.labels is None:
        return tuple(range(min(count, len(sample.ids))))
    first: dict[int, int] = {}
    for row, label in enumerate(sample.labels):
        first.setdefault(label, row)
    chosen = [first[label] for label in sorted(first)][:count]
    rest = [row for row in range(len(sample.ids)) if row not in chosen][: count - len(chosen)]
    return tuple(chosen + rest)


def _neighbours(h: Tensor, queries: Sequence[int], count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Nearest others of each query; a copy of it counts as another."""
    similarity, index = nearest(h, h[list(queries)], count + 1)
    rows, near = [], []
    for query, own, value in zip(queries, index.tolist(), similarity.tolist(), strict=True):
        others = [(row, much) for row, much in zip(own, value, strict=True) if row != query][:count]
        rows.append([row for row, _ in others])
        near.append([much for _, much in others])
    return np.array(rows, dtype=np.int64), np.array(near, dtype=np.float64)
