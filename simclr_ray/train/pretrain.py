"""The driver of a pretraining: check everything, start Ray Train, show progress, keep the run's status."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, load_config, require_places, use_storage
from simclr_ray.data.cursor import SegmentCursor
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.stream import (
    PlanAddress,
    configure_ray_data,
    execution_options,
    unit_stream,
)
from simclr_ray.errors import ClusterError, SimclrError, root_cause
from simclr_ray.observe.console import Console
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.cluster import (
    beside_the_driver,
    connected,
    prints_logged,
    refuse_other_versions,
    resolve_views,
    resolve_workers,
)
from simclr_ray.train.derive import (
    Derived,
    block_units,
    bytes_ahead,
    check_world_size,
    derive,
    limits_of,
    policy_of,
    sentences,
    shares,
)
from simclr_ray.train.desk import Desk
from simclr_ray.train.elastic import PretrainTrainer, Room, StreamPlace
from simclr_ray.train.keeper import Keeper, graceful_stop
from simclr_ray.train.lock import RunLock, hold
from simclr_ray.train.planes import planes_of
from simclr_ray.train.run import RunFolder, absolute, look_at_run, note_views, open_run, start_afresh
from simclr_ray.train.step import NonFiniteStepError
from simclr_ray.train.step_log import TooManyRejectedError
from simclr_ray.train.worker import WorkerOrder, train_worker
from simclr_ray.views.make import how_views_are_made, maker
from simclr_ray.views.stage import ViewStage, Where

POLL_S = 0.5


@dataclass(frozen=True)
class RunResult:
    """What a pretraining left behind."""

    folder: str
    """The run folder, for `evaluate` and `load_encoder`."""
    steps: int
    """Optimizer steps done."""
    metrics: Mapping[str, float]
    """The last record; empty when the run was finished already."""


@dataclass(frozen=True)
class Origin:
    """Another run's checkpoint to begin from: weights, optimizer and position in the data."""

    folder: str
    """Run folder that holds it."""
    step: int


Beside = Callable[[Config, RunFolder], AbstractContextManager[None]]
"""What goes on beside a training, while Ray runs."""


def pretrain(
    config: ConfigSource = None,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    origin: Origin | None = None,
    stop: threading.Event | None = None,
    beside: Beside = lambda config, run: nullcontext(),
) -> RunResult:
    """Train an encoder; run it again with the same `run.folder` and it continues where it stands.

    Args:
        config: A YAML file, a mapping, or a `Config`.
        overrides: Such as `["train.global_batch=512"]`, applied on top.
        fresh: Remove what an earlier run left in `run.folder` and start again.
        origin: Where to begin; it counts only until the run has a checkpoint of its own.
        stop: Once it is set, from any thread, all ranks save at the next step and end, as after Ctrl-C.
        beside: Entered when workers are about to start, left when they have ended; for evaluation while training.

    Raises:
        KeyboardInterrupt: it was stopped.
        ConfigError: a setting cannot work, or another driver holds the run folder (before Ray starts).
        DataError: the data set is missing, broken or changed, or too many images were rejected.
        ClusterError: Ray, its resources or its workers failed for good.
        StorageError: the run folder cannot be read or written.
        NumericsError: the loss or a gradient is not finite.
    """
    settings = load_config(config, overrides)
    require_places(settings)
    use_storage(settings)
    manifest = read_manifest(storage.normalise(str(settings.data.train)))
    derived = derive(settings, manifest)
    policy_of(settings.views)
    if settings.cluster.workers:
        check_world_size(settings.cluster.workers, derived)
    run = look_at_run(str(settings.run.folder))
    console = Console(total_steps=derived.total_steps, run_folder=run.uri)
    with hold(run.uri, console.say) as lock:
        if fresh:
            start_afresh(run)
        return _pretrain(
            settings, manifest, derived, console, lock,
            origin=origin, stop=stop or threading.Event(), beside=beside,
        )  # fmt: skip


def _pretrain(
    settings: Config, manifest: Manifest, derived: Derived, console: Console, lock: RunLock, *,
    origin: Origin | None, stop: threading.Event, beside: Beside,
) -> RunResult:  # fmt: skip
    """With the run folder held."""
    run, existed = open_run(settings, derived, manifest.fingerprint, say=console.say)
    newest = ckpt.load_newest(run.checkpoints, console.say)
    if newest is None and origin is not None:
        newest = _begin_from(origin, run, manifest)
        console.say(f"begins from step {origin.step} of {origin.folder}")
    done = newest.step if newest else 0
    if done >= derived.total_steps:
        console.say(f"{run.uri}: finished already, {done} steps; nothing to do")
        run.update(status="finished")  # a kill may have come between the last checkpoint and this word
        return RunResult(run.uri, done, {})
    console.say(
        f"run: {run.uri}" + (f" (continues; {done} of {derived.total_steps} steps are saved)" if existed else "")
    )
    for line in sentences(settings, derived):
        console.say(line)
    with connected(settings.cluster), prints_logged():
        refuse_other_versions()
        planes = planes_of(settings.cluster, ray.nodes())
        workers, use_gpu = resolve_workers(settings.cluster, planes)
        check_world_size(workers, derived)
        parts = " + ".join(map(str, shares(derived, workers, block_units(settings, derived, workers))))
        console.say(f"workers: {workers} on {'GPU' if use_gpu else 'CPU'}; per-rank share {parts} images")
        where, why = resolve_views(
            settings.views.where, settings.cluster, planes, workers=workers, use_gpu=use_gpu,
            maker=maker(),
        )  # fmt: skip
        console.say(f"views: {how_views_are_made(where)}, going by the driver's machine ({why})")
        note_views(run, maker=maker(), where=where, say=console.say)
        setup = _Setup(settings, manifest, derived, run, console, lock, workers, use_gpu, where, stop)
        with beside(absolute(settings), run):
            return _run(setup)


def _begin_from(origin: Origin, run: RunFolder, manifest: Manifest) -> ckpt.Checkpoint:
    """Copy another run's checkpoint here, and note in `run.json` where it came from.

    Raises:
        StorageError: it is not whole.
        DataError: it was made from another data set.
    """
    source = RunFolder(storage.normalise(origin.folder))
    run.update(origin={"folder": source.uri, "step": origin.step})
    return ckpt.copy(source.checkpoints, origin.step, run.checkpoints, manifest=manifest.fingerprint)


@dataclass(frozen=True)
class _Setup:
    """What one start of a run was found to be."""

    config: Config
    manifest: Manifest
    derived: Derived
    run: RunFolder
    console: Console
    lock: RunLock
    workers: int
    use_gpu: bool
    where: Where
    stop: threading.Event


def _run(setup: _Setup) -> RunResult:
    """Train until the last step, over as many rollbacks as are allowed."""
    run = setup.run
    desk = beside_the_driver(Desk).remote((run.info() or {}).get("attempts", 0))
    run.update(status="running", workers=setup.workers)
    place = StreamPlace(setup.config.cluster, planes_of(setup.config.cluster, ray.nodes()))
    room = Room(setup.config.cluster, setup.console.say, place)
    keeper = Keeper(
        run, desk, setup.console, setup.lock, setup.manifest, limits_of(setup.config.data), room, _asked(setup)
    )
    status = "failed"
    try:
        with setup.console, graceful_stop(keeper.stop):
            while (error := _fit(setup, desk, keeper)) is not None:
                _roll_back(setup, desk, error)
        status = "interrupted" if keeper.stopping and not _is_done(setup) else "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        place.free()
        rejected = keeper.reasons()
        keeper.close(status)
    if rejected:
        setup.console.say(f"images that could not be used: {rejected}; all in {run.path('quarantine.parquet')}")
    if status == "interrupted":
        setup.console.say(f"interrupted; run the same command again to continue from {_newest(setup.run)}")
        raise KeyboardInterrupt
    return RunResult(run.uri, setup.derived.total_steps, keeper.last)


def _is_done(setup: _Setup) -> bool:
    """Whether the last step's checkpoint is there: a stop may come too late to interrupt anything."""
    return max(ckpt.committed_steps(setup.run.checkpoints), default=0) >= setup.derived.total_steps


def _asked(setup: _Setup) -> str:
    per_worker = f"{setup.config.cluster.cpus_per_worker:g} CPU" + (" and a GPU" if setup.use_gpu else "")
    return f"{setup.workers} worker{'s' * (setup.workers > 1)} of {per_worker} each"


def _fit(setup: _Setup, desk: Any, keeper: Keeper) -> NonFiniteStepError | None:
    """Run Ray Train once.

    Returns:
        The step that must be left out before training can go on; None when training has ended.

    Raises:
        SimclrError: training cannot go on.
    """
    trainer = _trainer(setup, desk)
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:  # handed to the driver's thread below
            outcome.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        if setup.stop.is_set() and not keeper.stopping:
            keeper.stop()
        keeper.look()
    keeper.look()
    error, fatal = outcome[0], ray.get(desk.fatal.remote())
    if isinstance(fatal, NonFiniteStepError) and setup.config.train.on_nonfinite == "rollback" and not keeper.stopping:
        return fatal
    if isinstance(fatal, TooManyRejectedError):
        fatal = TooManyRejectedError(
            fatal.what, where=fatal.where, got=keeper.reasons(), expected=fatal.expected, fix=fatal.fix
        )
    if fatal is None and error is None:
        return None
    explained = _explain(error, fatal, setup, ray.get(desk.why_it_ended.remote()))
    if fatal is None and keeper.stopping:
        setup.console.say(f"ended without a last checkpoint: {explained.what}")
        return None
    raise explained from error


def _roll_back(setup: _Setup, desk: Any, error: NonFiniteStepError) -> None:
    """Note a step as left out; the next attempt starts from the newest checkpoint and passes over it.

    Raises:
        NonFiniteStepError: there were enough of them.
    """
    left_out, allowed = _left_out(setup.run), setup.config.train.max_rollbacks
    if len(left_out) >= allowed:
        raise error
    setup.run.update(left_out=sorted(left_out | {error.step}))
    setup.console.say(
        f"{error.what} at step {error.step} ({error.got}); its images are left out "
        f"({len(left_out) + 1} of {allowed} such steps), going back to the newest checkpoint"
    )
    ray.get(desk.pardon.remote())


def _left_out(run: RunFolder) -> frozenset[int]:
    return frozenset((run.info() or {}).get("left_out", []))


def _trainer(setup: _Setup, desk: Any) -> PretrainTrainer:
    config, derived, run, cluster = setup.config, setup.derived, setup.run, setup.config.cluster
    configure_ray_data()
    per_block = block_units(config, derived, setup.workers)
    cursor = beside_the_driver(SegmentCursor).remote()
    stream = unit_stream(
        PlanAddress(setup.manifest.folder, setup.manifest.fingerprint, config.run.seed),
        cursor,
        ViewStage(
            policy_of(config.views), config.run.seed, limits_of(config.data), setup.where, config.views.scaled_decode
        ),
        unit_rows=derived.unit_rows,
        units_per_task=config.data.units_per_task,
        units_per_block=per_block,
        limits=limits_of(config.data),
    )
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if setup.use_gpu else {})
    fewest = min(cluster.min_workers or setup.workers, setup.workers)
    order = WorkerOrder(
        absolute(config), derived, run, setup.manifest.fingerprint, setup.where, cursor, desk, per_block, _left_out(run)
    )
    return PretrainTrainer(
        train_worker,
        cluster=cluster,
        desk=desk,
        train_loop_config={"order": order},
        datasets={"train": stream},
        dataset_config=ray.train.DataConfig(
            execution_options=execution_options(bytes_ahead(config, derived), cluster.data_labels)
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if setup.use_gpu else "gloo", timeout_s=int(cluster.first_step_timeout_s)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fewest, setup.workers) if fewest < setup.workers else setup.workers,
            use_gpu=setup.use_gpu,
            resources_per_worker=resources,
            label_selector=dict(cluster.train_labels) if cluster.train_labels else None,
            elastic_resize_monitor_interval_s=cluster.resize_check_s,
        ),
        run_config=ray.train.RunConfig(
            # Ray resumes a run by name; ours resumes by its own checkpoints, so each start gets a fresh name.
            name=f"start-{ray.get(desk.attempts.remote()) + 1:04d}-{ray.get_runtime_context().get_job_id()}",
            storage_path=run.path("ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures,
                max_preemption_failures=cluster.max_preemptions,
                controller_failure_limit=max(2, cluster.max_failures),  # a node lost while a group starts is one
            ),
        ),
    )


def _explain(error: BaseException | None, fatal: SimclrError | None, setup: _Setup, ended: str | None) -> SimclrError:
    """The user's error behind what Ray raised, or a sentence about Ray's own."""
    cause = fatal or root_cause(error)
    if cause is not None:
        return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ClusterError(
        f"training stopped: {ended or (lines[-1] if lines else type(error).__name__)}",
        where="Ray Train",
        expected=f"at most {setup.config.cluster.max_failures} restarts (cluster.max_failures)",
        fix=f"run the same command again to continue from {_newest(setup.run)}; Ray's logs are in its session folder",
    )


def _newest(run: RunFolder) -> str:
    """Where the same command would go on, as far as the store can still tell."""
    try:
        steps = ckpt.committed_steps(run.checkpoints)
    except SimclrError:
        return "the newest checkpoint"
    return f"the checkpoint of step {max(steps):,}" if steps else "the beginning, for there is no checkpoint yet"
