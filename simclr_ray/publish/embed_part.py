"""One part from shards to a file of embeddings: read ahead, decode beside the encoder, encode, write. No Ray here.

What is encoded together is fixed by the part alone, `ROWS_AT_ONCE` images from its first on, so a part that is made
again, by whom and when ever, has the same bytes on the same kind of machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from simclr_ray import storage
from simclr_ray.data.decode import Limits, Pixels, Rejected, decode
from simclr_ray.data.inputs import Columns, Row, read_inputs
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import NumericsError
from simclr_ray.publish.parts import Dtype, Embedded, Part, PartNote, RejectedImage, Vectors, ranges_of, to_parquet
from simclr_ray.train.step import autocast_of
from simclr_ray.views.apply import central_view, normalise
from simclr_ray.views.policy import Policy

Precision = Literal["fp32", "bf16"]
ROWS_AT_ONCE = 256
"""Images that go through the encoder together: 38 MB of 224 px."""

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class EmbedOrder:
    """All that decides the files of a work, and what an actor needs to make one of them."""

    work: str
    """Digest of what decides the vectors."""
    folder: str
    manifest: Manifest
    columns: Columns
    limits: Limits
    policy: Policy
    dtype: Dtype
    precision: Precision
    width: int
    """D, length of a vector."""


class PartReport(NamedTuple):
    """What came of a part."""

    rows: int
    """Embeddings in its file."""
    rejected: int
    bytes: int


class Prepared(NamedTuple):
    """Images at evaluation size, and what is known of them."""

    views: npt.NDArray[np.uint8]
    """(n, S, S, 3), of those that decode."""
    good: list[Row]
    bad: list[RejectedImage]


@dataclass
class PartMaker:
    """An encoder on its device, which makes one part after the other."""

    order: EmbedOrder
    encoder: nn.Module
    """(n, 3, S, S) -> (n, D); in evaluation mode, on `device`."""
    device: torch.device
    threads: int = 0
    """Threads that decode beside the encoder; 0 decodes in its own, in turns with it."""
    _pool: ThreadPoolExecutor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Start the threads."""
        if self.threads:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def make(self, part: Part) -> PartReport:
        """Embed a part and write its file.

        Raises:
            DataError: a shard is another one than the manifest's.
            StorageError: a store fails.
            NumericsError: an embedding is not finite, or too large for the dtype.
        """
        order = self.order
        rows = read_inputs(list(ranges_of(order.manifest, part)), order.columns)
        vectors, good, bad = [np.empty((0, order.width), order.dtype)], list[Row](), list[RejectedImage]()
        for prepared in _ahead(self._pool, self.threads + 1, _in_runs(rows), self._prepare):
            bad += prepared.bad
            if prepared.good:
                good += prepared.good
                vectors.append(self._encode(prepared))
        embedded = Embedded(
            [row.sample_id for row in good], [row.uri for row in good], [row.label for row in good],
            np.concatenate(vectors),
        )  # fmt: skip
        note = PartNote(order.work, part.first, part.stop, tuple(bad))
        data = to_parquet(embedded, note, labelled=order.columns.label is not None)
        storage.write_bytes(storage.join(order.folder, part.name), data)
        return PartReport(len(good), len(bad), len(data))

    def _prepare(self, rows: list[Row]) -> Prepared:
        return prepare(rows, self.order.policy, self.order.limits)

    @torch.inference_mode()
    def _encode(self, prepared: Prepared) -> Vectors:
        views = torch.from_numpy(prepared.views).to(self.device)
        with autocast_of(self.order.precision, self.device)():
            h = self.encoder(normalise(views, self.order.policy))
        vectors: Vectors = h.float().cpu().numpy().astype(self.order.dtype)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            row = prepared.good[int(np.flatnonzero(~finite)[0])]
            raise NumericsError(
                f"an embedding is not finite as {self.order.dtype}", where=row.uri, got=f"sample id {row.sample_id}",
                fix="use --dtype float32; if that fails too, the encoder has diverged",
            )  # fmt: skip
        return vectors


def prepare(rows: list[Row], policy: Policy, limits: Limits) -> Prepared:
    """Decode rows to evaluation size; those that do not decode are listed with what is wrong with them."""
    images, good, bad = list[Pixels](), list[Row](), list[RejectedImage]()
    for row in rows:
        uri = storage.tellable(row.uri)
        image = None if row.lost else decode(row.image, limits)
        if image is None:
            bad.append(RejectedImage(row.sample_id, uri, row.lost, "could not be read"))
        elif isinstance(image, Rejected):
            bad.append(RejectedImage(row.sample_id, uri, image.reason, image.detail))
        else:
            images.append(image)
            good.append(row._replace(image=None, uri=uri))
    return Prepared(central_view(images, policy), good, bad)


def _in_runs(rows: Iterable[Row]) -> Iterator[list[Row]]:
    source = iter(rows)
    while run := list(islice(source, ROWS_AT_ONCE)):
        yield run


def _ahead(pool: ThreadPoolExecutor | None, most: int, items: Iterator[A], function: Callable[[A], B]) -> Iterator[B]:
    """`map` by threads, in order, with at most `most` items under way; without a pool, `map`."""
    if pool is None:
        yield from map(function, items)
        return
    running = deque[Future[B]]()
    while True:
        running += [pool.submit(function, item) for item in islice(items, most - len(running))]
        if not running:
            return
        yield running.popleft().result()
