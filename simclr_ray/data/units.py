"""Units on their way from shards into the stream: what a task must know, reading ahead, and units that are lost.

A task is given the byte ranges of its units and of those that stand in for them, so it needs neither the manifest nor
the plan, which take hundreds of megabytes for 10^9 images. No Ray here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from simclr_ray.data.decode import REASONS, Limits, Rejected, read_header
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Plan, PlannedUnit, row_order, stand_ins
from simclr_ray.data.ranges import LostShard
from simclr_ray.data.read import LOST, RowRange, read_range, resolve
from simclr_ray.errors import DataError

BYTES_AHEAD = 64 << 20
"""Units of a task that are read before they are needed: some units of photographs, so that a store's latency passes
while the CPU is busy with those before."""
_READERS = 8

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class UnitRead(NamedTuple):
    """A planned unit and where its rows are stored."""

    position: int
    """In the endless plan, j."""
    epoch: int
    number: int
    """Of the unit in its table; with epoch and seed it decides the order of the rows."""
    pieces: tuple[RowRange, ...]

    @property
    def bytes_about(self) -> int:
        """Memory that reading it takes, more or less."""
        return sum(piece.bytes_about for piece in self.pieces)


class TaskPlan(NamedTuple):
    """Units [start, stop) of the plan, and all that reading them takes."""

    start: int
    stop: int
    seed: int
    num_units: int
    """Of an epoch."""
    image_column: str
    units: Mapping[int, UnitRead]
    """By position in the plan: the task's own, and those that may stand in for them."""
    limits: Limits
    """What an image may be."""


def plan_tasks(
    manifest: Manifest, plan: Plan, start: int, stop: int, units_per_task: int, limits: Limits | None = None
) -> list[TaskPlan]:
    """Cut units [start, stop) of the plan into tasks."""
    resolved: dict[int, UnitRead] = {}

    def unit(index: int) -> UnitRead:
        if index not in resolved:
            resolved[index] = resolve_unit(manifest, plan.unit(index))
        return resolved[index]

    count = plan.units.num_units
    tasks, limits = [], limits or Limits()
    for first in range(start, stop, units_per_task):
        own = range(first, min(first + units_per_task, stop))
        needed = dict.fromkeys([*own, *(other for index in own for other in stand_ins(index, count))])
        units = {index: unit(index) for index in needed}
        tasks.append(TaskPlan(own.start, own.stop, plan.seed, count, manifest.image_column, units, limits))
    return tasks


def resolve_unit(manifest: Manifest, unit: PlannedUnit) -> UnitRead:
    """Where the rows of a unit are stored."""
    return UnitRead(unit.index, unit.epoch, unit.number, tuple(resolve(manifest, piece) for piece in unit.pieces))


def read_task(task: TaskPlan) -> Iterator[pa.Table]:
    """The units of a task in planned order, each as `read_unit` gives it, read ahead of their use.

    Raises:
        DataError: a shard is another one than the manifest's, or so many units in a row are of no use that none can
            stand in for the others.
        StorageError: the store fails.
    """
    return read_ahead(
        range(task.start, task.stop), lambda index: read_planned(task, index),
        cost=lambda index: task.units[index].bytes_about, max_cost=BYTES_AHEAD,
    )  # fmt: skip


def read_planned(task: TaskPlan, index: int) -> pa.Table:
    """A unit of the plan, or the one that stands in for it.

    A unit without an image that can be used gives its place to the next of its epoch that has one (`stand_ins`): each
    of its rows is lost with its shard or rejected by its header, such as the error pages of a site that is gone. As the
    other unit is also used in its own place, its rows stand here in views of their own: the d-th unit after this one
    begins at use d * R. What fails only when its pixels are decoded is not known here.

    Returns:
        `read_unit`'s table; of a stand-in, `lost_id` and `lost_reason` are those of the rows that were planned here.
    """
    own = read_unit(task.units[index], task.seed, task.image_column)
    if _is_of_use(own, task.limits):
        return own
    reasons = _reasons(own, task.limits)
    for distance, other in enumerate(stand_ins(index, task.num_units), start=1):
        table = read_unit(task.units[other], task.seed, task.image_column)
        if _is_of_use(table, task.limits):
            uses = pa.array(np.full(len(table), distance * len(table), dtype=np.int64))
            changes = {"unit": own["unit"], "use": uses, "lost_id": own["sample_id"], "lost_reason": reasons}
            return pa.table({name: changes.get(name, table[name]) for name in table.column_names})
    shards = sorted({piece.source.uri for piece in task.units[index].pieces})
    after = len(stand_ins(index, task.num_units))
    raise DataError(
        f"unit {index} of the plan has no image that can be used, and neither has any of the {after} after it",
        where=shards[0], got=", ".join(sorted({REASONS[code] for code in reasons.to_pylist()})),
        fix="look whether the data set is still there and what is in it; pack or index the images again",
    )  # fmt: skip


def read_unit(unit: UnitRead, seed: int, image_column: str) -> pa.Table:
    """Rows of one unit in planned order.

    Returns:
        R rows: `image` (null where it could not be read), `sample_id`, `unit`, `epoch`, `use` (0), and `lost_id` and
        `lost_reason` (number in `REASONS`) of the image that was lost here, -1 where none was.

    Raises:
        DataError: a shard is another one than the manifest's, or the column of images is missing or of another type.
        StorageError: the store fails.
    """
    rows = pa.concat_tables([_read_piece(piece, image_column) for piece in unit.pieces])
    rows = rows.take(pa.array(row_order(len(rows), seed=seed, epoch=unit.epoch, unit=unit.number)))
    ids, lost = rows["sample_id"].to_numpy(), rows[LOST].to_numpy()
    return pa.table({
        "image": rows["image"],
        "sample_id": ids,
        "unit": np.full(len(rows), unit.position, dtype=np.int64),
        "epoch": np.full(len(rows), unit.epoch, dtype=np.int64),
        "use": np.zeros(len(rows), dtype=np.int64),
        "lost_id": np.where(lost < 0, -1, ids),
        "lost_reason": lost,
    })  # fmt: skip


def _read_piece(piece: RowRange, image_column: str) -> pa.Table:
    """`image`, `sample_id` and `lost_reason` of a piece; a lost shard's images are null."""
    try:
        table = read_range(piece, [image_column], image_column).rename_columns(["image", "sample_id", LOST])
    except LostShard as lost:
        _warn_once(str(lost))
        code = np.full(piece.rows, REASONS.index(lost.reason), dtype=np.int8)
        table = pa.table({"image": pa.nulls(piece.rows, pa.binary()), "sample_id": piece.sample_ids, LOST: code})
    return table.set_column(0, "image", table["image"].cast(pa.binary()))


def _is_of_use(unit: pa.Table, limits: Limits) -> bool:
    """Whether one image of a unit is there and has a good header; nearly always the first tells."""
    rows = zip(unit["image"], unit["lost_reason"].to_pylist(), strict=True)
    return any(lost < 0 and not isinstance(read_header(image.as_py(), limits), Rejected) for image, lost in rows)


def _reasons(unit: pa.Table, limits: Limits) -> pa.Array:
    """Numbers of the reasons against the rows of a unit that is of no use, int8 (R,)."""
    codes = unit["lost_reason"].to_numpy().copy()
    for row in np.flatnonzero(codes < 0).tolist():
        header = read_header(unit["image"][row].as_py(), limits)
        assert isinstance(header, Rejected)
        codes[row] = REASONS.index(header.reason)
    return pa.array(codes, pa.int8())


def read_ahead(items: Iterable[T], read: Callable[[T], R], *, cost: Callable[[T], int], max_cost: int) -> Iterator[R]:
    """Read items by threads before they are asked for, and yield the results in order.

    An item that cannot be read raises at its turn, after all before it were yielded.

    Args:
        items: What to read; asked for one by one.
        read: Reads one.
        cost: Of one, such as its bytes.
        max_cost: Of all that are being read or wait to be yielded; one of them may always be read.
    """
    source, waiting = iter(items), deque[T]()
    pending, ahead = deque[tuple[Future[R], int]](), 0
    try:
        while True:
            while waiting or (waiting := deque(islice(source, 1))):
                spent = cost(waiting[0])
                if pending and ahead + spent > max_cost:
                    break
                pending.append((_pool().submit(read, waiting.popleft()), spent))
                ahead += spent
            if not pending:
                return
            future, spent = pending.popleft()
            result = future.result()
            ahead -= spent
            yield result
    finally:
        for future, _ in pending:
            future.cancel()


@lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    log.warning("%s", text)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Threads of this process for whole units; they may wait for those of single images and of parts."""
    return ThreadPoolExecutor(_READERS, thread_name_prefix="unit")
