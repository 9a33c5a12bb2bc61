"""The Ray Data stream: finished units in plan order, in blocks of one or a few, split over the train workers.

One Ray task reads a run of consecutive units and hands them to `transform` (decode, draw, apply) one block at a
time; `preserve_order` keeps the plan's order whatever the tasks' speed, a strict repartition cuts the output into
blocks of exactly d units, and an equal `streaming_split` deals block j to rank j mod W. A block costs Ray the same
whatever is in it (`benchmarks/ingest.py`), so d is as large as the shares of the ranks allow (`plan.units_per_block`).

Which units an execution streams is asked of a `SegmentCursor` when it starts. Rank 0 sets the cursor to where the
loaded checkpoint stands and then moves it from segment to segment, so the position has one source of truth, and a
stream of any length costs no more than one segment's tasks at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, update_wrapper
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from simclr_ray.data import units
from simclr_ray.data.calm import CalmLoop
from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.plan import Plan, PlannedUnit, Segment, UnitTable
from simclr_ray.data.units import plan_tasks, read_task
from simclr_ray.errors import DataError

Columns = dict[str, np.ndarray]
Transform = Callable[[Columns], Columns]


@dataclass(frozen=True)
class PlanAddress:
    """All that names a plan; small, so it travels to the stream's coordinator in place of the plan itself."""

    folder: str
    fingerprint: str
    seed: int


@lru_cache(maxsize=1)
def load_plan(address: PlanAddress) -> tuple[Manifest, Plan]:
    """Load a plan in this process, once; only the driver and the stream's coordinator do.

    Raises:
        DataError: when the manifest is not the one that the address was made of.
    """
    manifest = read_manifest(address.folder)
    if manifest.fingerprint != address.fingerprint:
        raise DataError(
            "the manifest changed",
            where=address.folder,
            got=manifest.fingerprint,
            expected=address.fingerprint,
            fix="restore the data set, or start a new run folder",
        )
    return manifest, Plan(UnitTable(manifest), address.seed)


class UnitSource(Datasource):  # type: ignore[misc]
    """Ray Data source of the units of the cursor's segment."""

    def __init__(self, address: PlanAddress, cursor: Any, units_per_task: int, limits: Limits) -> None:
        super().__init__()
        self._address, self._cursor, self._units_per_task, self._limits = address, cursor, units_per_task, limits

    def get_name(self) -> str:
        """Name in Ray's statistics."""
        return "Units"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown; Ray uses it only to choose a parallelism, which is fixed here."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Tasks of the segment. Ray calls this several times an execution, so it has no effect and keeps no count."""
        segment: Segment = ray.get(self._cursor.where.remote())
        if segment.padded_start == segment.padded_stop:
            return []
        return list(read_tasks(self._address, segment, self._units_per_task, self._limits))


_MADE: dict[tuple[PlanAddress, Segment, int, Limits], tuple[ReadTask, ...]] = {}
"""The tasks of the last segment alone."""


def read_tasks(
    address: PlanAddress, segment: Segment, units_per_task: int, limits: Limits | None = None
) -> tuple[ReadTask, ...]:
    """Tasks of a segment, kept until those of another one are asked for.

    Ray asks for an execution's tasks several times, and 40,000 units take a second to find. Those of the segment before
    are dropped first: two segments' at once would take twice the memory.

    Raises:
        DataError: the manifest is another one.
    """
    key = (address, segment, units_per_task, limits or Limits())
    made = _MADE.get(key)
    if made is None:
        _MADE.clear()
        made = _MADE[key] = _made(*key)
    return made


def _made(address: PlanAddress, segment: Segment, units_per_task: int, limits: Limits) -> tuple[ReadTask, ...]:
    manifest, plan = load_plan(address)
    tasks = plan_tasks(manifest, plan, segment.padded_start, segment.padded_stop, units_per_task, limits)
    return tuple(
        ReadTask(
            update_wrapper(partial(read_task, task), read_task),  # Ray asks for a name
            BlockMetadata(
                num_rows=(task.stop - task.start) * plan.units.unit_rows,
                size_bytes=None, exec_stats=None, input_files=None,
            ),
        )
        for task in tasks
    )  # fmt: skip


def read_unit(manifest: Manifest, unit: PlannedUnit) -> pa.Table:
    """Rows of a unit in planned order, as `units.read_unit` gives them; nothing stands in for a lost one.

    Raises:
        DataError: a shard is another one than the manifest's, or the column of images is missing or of another type.
        StorageError: the store fails.
    """
    return units.read_unit(units.resolve_unit(manifest, unit), unit.seed, manifest.image_column)


def unit_stream(
    address: PlanAddress,
    cursor: Any,
    transform: Transform,
    *,
    unit_rows: int,
    units_per_task: int,
    units_per_block: int = 1,
    limits: Limits | None = None,
) -> ray.data.Dataset:
    """The lazily executed stream of transformed units; give it to a TorchTrainer or `streaming_split` it.

    Args:
        address: The plan.
        cursor: A `SegmentCursor` actor.
        transform: Columns of a block's units to columns of the same units, the same number of rows.
        unit_rows: R.
        units_per_task: Consecutive units a task, at least; whole blocks.
        units_per_block: Consecutive units a block, d.
        limits: What an image may be, as for `transform`: another unit stands in for one that has none.
    """
    block_rows = units_per_block * unit_rows
    units_per_task += -units_per_task % units_per_block
    source = UnitSource(address, cursor, units_per_task, limits or Limits())
    frame = ray.data.read_datasource(source, override_num_blocks=1)
    frame = frame.map_batches(transform, batch_size=block_rows, batch_format="numpy")
    return frame.repartition(target_num_rows_per_block=block_rows, strict=True)


def execution_options(max_bytes_ahead: int, labels: Mapping[str, str] | None = None) -> ray.data.ExecutionOptions:
    """Options under which the stream keeps the plan's order and does not run far ahead of a slow trainer.

    Args:
        max_bytes_ahead: Object-store memory of finished units that nobody has taken yet. Without a bound Ray Data would
            make as much as half the object store holds, at the trainer's expense where they share cores.
        labels: Of the nodes that the stream's tasks may run on (a label selector of Ray's); any without.
    """
    return ray.data.ExecutionOptions(
        preserve_order=True,
        label_selector=dict(labels) if labels else None,
        resource_limits=ray.data.ExecutionResources(object_store_memory=float(max_bytes_ahead)),
    )


def configure_ray_data() -> None:
    """Settings of the driver's Ray Data context that the stream's tasks and coordinator inherit."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    if CalmLoop not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(CalmLoop)
