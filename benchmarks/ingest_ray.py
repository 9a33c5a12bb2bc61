"""The stream of benchmarks/ingest.py: units through Ray Data into a real Ray Train worker that only receives.

Source, transform, options and the loop over batches are the package's own, as a training run has them; only the step
is left out, or is a pause (`slow`). The worker reads the clocks of the whole tree of Ray's processes itself, when the
stream runs steadily and when it ends.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
from ingest_meter import ENDED, Usage, between, mark, memory
from ray._private import internal_api
from ray._private.state import state

from simclr_ray.data.cursor import SegmentCursor
from simclr_ray.data.decode import Limits
from simclr_ray.data.plan import Segment, units_per_block
from simclr_ray.data.stream import Columns, PlanAddress, configure_ray_data, execution_options, unit_stream
from simclr_ray.train.batches import Shares, step_batches
from simclr_ray.train.cluster import asking_nobody, variables
from simclr_ray.train.derive import MOST_BLOCK_BYTES
from simclr_ray.views.policy import Policy
from simclr_ray.views.stage import ViewStage

UNIT_ROWS = 64
CPUS = 2
"""Declared to Ray: one for the train worker, one for the stream."""
ROLES = ("stream's tasks", "train worker", "coordinator", "controller", "driver", "raylet, GCS", "others of Ray")


@dataclass(frozen=True)
class Stream:
    """What is streamed, and how."""

    address: PlanAddress
    policy: Policy
    units_per_step: int
    units_per_task: int
    steps_ahead: int
    prefetch_units: int

    @property
    def unit_bytes(self) -> int:
        return UNIT_ROWS * 2 * 3 * self.policy.size**2

    @property
    def units_per_block(self) -> int:
        """As the driver of a training computes it."""
        most = min(self.units_per_task, MOST_BLOCK_BYTES // self.unit_bytes)
        return units_per_block(self.units_per_step, fewest=1, workers=1, most=most)

    @property
    def bytes_ahead(self) -> int:
        """As the driver of a training computes it."""
        return self.unit_bytes * max(self.steps_ahead * self.units_per_step, 4 * self.units_per_task)


@dataclass(frozen=True)
class StreamRun:
    """Of the whole tree of processes."""

    images: int
    wall_s: float
    cpu_s: float
    stage_s: float
    """CPU time of the stage itself, in the same run."""
    others_cores: float
    load: float
    """Load average of the machine before Ray started."""
    by_role_s: dict[str, float]
    """CPU time."""
    idle_cores: dict[str, float]
    """Cores that each role takes while the stream is full and nobody takes from it."""
    ended_s: float
    """CPU time of processes that ended meanwhile, part of `others of Ray`."""
    wait_s: float
    """How long the worker waited for the stream."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MeteredStage:
    """The stage, with a note of the CPU time of every unit.

    Speeds of a shared machine differ from one run to the next by more than what is looked for here; what the very same
    run spent on views does not depend on that.
    """

    stage: ViewStage
    folder: str

    def __call__(self, unit: Columns) -> Columns:
        started = time.thread_time()
        views = self.stage(unit)
        spent = time.thread_time() - started
        with Path(self.folder, f"{os.getpid()}.txt").open("a") as notes:
            notes.write(f"{unit['unit'][0]} {spent}\n")
        return views

    def spent(self, units: range) -> float:
        """CPU seconds of these units, whichever process made them."""
        lines = [line.split() for file in Path(self.folder).iterdir() for line in file.read_text().splitlines()]
        return sum(float(seconds) for unit, seconds in lines if int(unit) in units)


class Sample(NamedTuple):
    """One look from outside."""

    at_s: float
    private_mib: float
    """Memory of Ray's processes and the driver, each for itself."""
    total_mib: float
    """The same with shared pages, which are mostly the object store's."""
    store_mib: float
    """Objects in the object store."""
    spilled_mib: float
    """Objects written to disk since the start: not one should be."""


@contextmanager
def local_ray(object_store_bytes: int | None) -> Iterator[None]:
    """A fresh cluster on this machine, stopped at the end."""
    with variables(
        RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_CHDIR_TO_TRIAL_DIR="0",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="120", PYTHONPATH=_path_for_workers(),
    ), asking_nobody():  # fmt: skip
        ray.init(
            address="local",
            num_cpus=CPUS,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()


def run_stream(
    stream: Stream, steps: int, *, skip: int, slow_s: float = 0.0, segments: int = 1,
    watch: Callable[[Path], None] | None = None,
) -> StreamRun:  # fmt: skip
    """Stream `steps` steps through a train worker, and before and after them some that are not measured.

    Args:
        stream: What to stream.
        steps: Steps to measure, from the arrival of one batch to that of another, between which the stream is equally
            far ahead.
        skip: Steps before, until all is warm.
        slow_s: Pause after each step, in place of a training step.
        segments: Executions of the stream that the steps are cut into.
        watch: Runs in a thread of this process meanwhile; its argument is a file that exists while steps are measured.
    """
    load = os.getloadavg()[0]
    configure_ray_data()
    cursor = SegmentCursor.remote()
    with tempfile.TemporaryDirectory() as scratch:
        flag, notes = Path(scratch, "measuring"), Path(scratch, "notes")
        notes.mkdir()
        stage = MeteredStage(ViewStage(stream.policy, stream.address.seed, Limits()), str(notes))
        frame = unit_stream(
            stream.address, cursor, stage, unit_rows=UNIT_ROWS, units_per_task=stream.units_per_task,
            units_per_block=stream.units_per_block,
        )  # fmt: skip
        config = {
            "root": os.getpid(), "cursor": cursor, "stream": stream, "first": skip, "last": skip + steps,
            "slow_s": slow_s, "segments": segments, "flag": str(flag),
        }  # fmt: skip
        trainer = ray.train.torch.TorchTrainer(
            _receive,
            train_loop_config=config,
            datasets={"train": frame},
            dataset_config=ray.train.DataConfig(execution_options=execution_options(stream.bytes_ahead)),
            torch_config=ray.train.torch.TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="ingest", storage_path=str(Path(scratch, "run"))),
        )
        watcher = threading.Thread(target=watch, args=(flag,), daemon=True) if watch else None
        if watcher:
            watcher.start()
        result = trainer.fit().return_value
        if watcher:
            watcher.join()
        measured = range((skip + 1) * stream.units_per_step, (skip + steps + 1) * stream.units_per_step)
        stage_s = stage.spent(measured)
    usage, idle = result["usage"], result["idle"]
    images = steps * stream.units_per_step * UNIT_ROWS
    return StreamRun(
        images, usage.wall_s, usage.cpu_s, stage_s, usage.others_cores, load, result["by_role_s"],
        {role: seconds / idle.wall_s for role, seconds in result["idle_by_role_s"].items()},
        usage.by_process[ENDED][1], result["wait_s"],
    )  # fmt: skip


def sampler(root: int, samples: list[Sample], every_s: float, start_s: float) -> Callable[[Path], None]:
    """A watcher for `run_stream` that fills `samples`, beginning when all has been steady for `start_s`."""

    def watch(flag: Path) -> None:
        while not flag.exists():
            time.sleep(0.1)
        time.sleep(start_s)
        started = time.monotonic()
        while flag.exists():
            samples.append(_sample(root, time.monotonic() - started))
            time.sleep(every_s)

    return watch


def _sample(root: int, at_s: float) -> Sample:
    held, store = memory(root), _store_stats()
    return Sample(at_s, held.private / 2**20, held.total / 2**20, store[0] / 2**20, store[1] / 2**20)


def _store_stats() -> tuple[int, int]:
    """Bytes in the object store, and bytes ever spilled. Ray has no public call for the second."""
    stats = internal_api.get_memory_info_reply(state).store_stats
    return stats.object_store_bytes_used, stats.spilled_bytes_total


def _receive(config: dict[str, Any]) -> dict[str, Any]:
    """What the train worker does."""
    stream: Stream = config["stream"]
    first, last, flag = config["first"], config["last"], Path(config["flag"])
    total = last + 1 + _steps_to_fill(stream)
    shares = Shares(
        0, 1, stream.units_per_step, stream.units_per_step, UNIT_ROWS,
        -(-total * stream.units_per_step // config["segments"]), stream.prefetch_units, stream.units_per_block,
    )  # fmt: skip

    def move_cursor(segment: Segment) -> None:
        ray.get(config["cursor"].move.remote(segment))

    marks, wait_s = [], 0.0
    shard = ray.train.get_dataset_shard("train")
    for batch in step_batches(shard, move_cursor, shares, first_step=0, last_step=total):
        if first < batch.step <= last:
            wait_s += batch.wait_s
        if batch.step in (first, last):
            marks.append(mark(config["root"]))
            flag.touch() if batch.step == first else flag.unlink()
        if batch.step == last:
            for pause_s in (FILL_S, IDLE_S):
                time.sleep(pause_s)
                marks.append(mark(config["root"]))
        elif batch.step < last:
            time.sleep(config["slow_s"])
    usage, idle = between(*marks[:2]), between(*marks[2:])
    return {
        "usage": usage, "idle": idle, "wait_s": wait_s,
        "by_role_s": _by_role(usage, config["root"]), "idle_by_role_s": _by_role(idle, config["root"]),
    }  # fmt: skip


FILL_S, IDLE_S = 4.0, 5.0
"""Until the stream is as far ahead as it may be, and how long it is watched then."""


def _steps_to_fill(stream: Stream) -> int:
    """Steps that the stream may have ready or begun at any moment."""
    units = stream.bytes_ahead // stream.unit_bytes + stream.prefetch_units + 2 * stream.units_per_task
    return -(-units // stream.units_per_step)


def _by_role(usage: Usage, root: int) -> dict[str, float]:
    """CPU seconds."""
    seconds = dict.fromkeys(ROLES, 0.0)
    for key, (title, spent) in usage.by_process.items():
        seconds[_role(key.pid, title, root)] += spent
    return seconds


def _role(pid: int, title: str, root: int) -> str:
    """One of `ROLES`, from what Ray writes into the process's title."""
    tasks, worker, coordinator, controller, driver, raylet, others = ROLES
    program = title.partition(" ")[0]
    if pid in (root, os.getpid()):
        return driver if pid == root else worker
    if program.endswith(("/raylet", "/gcs_server")):
        return raylet
    if not program.startswith("ray::"):
        return others
    if "SplitCoordinator" in title:
        return coordinator
    if "Controller" in title:
        return controller
    return tasks if "Units" in title or "IDLE" in title else others


def _path_for_workers() -> str:
    """Ray's workers unpickle functions of these modules, so they must find them."""
    here = str(Path(__file__).parent)
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
