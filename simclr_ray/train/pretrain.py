"""The driver of a pretraining: check everything, start Ray Train, show progress, keep the run's status."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, load_config
from simclr_ray.data.cursor import SegmentCursor
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.stream import (
    PlanAddress,
    configure_ray_data,
    execution_options,
    unit_stream,
)
from simclr_ray.errors import ClusterError, ConfigError, SimclrError, root_cause
from simclr_ray.observe.console import Console
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.cluster import beside_the_driver, connected, prints_logged, resolve_views, resolve_workers
from simclr_ray.train.derive import Derived, check_world_size, derive, limits_of, policy_of, sentences, shares
from simclr_ray.train.desk import Desk, News
from simclr_ray.train.run import RunFolder, open_run, read_quarantine, write_quarantine
from simclr_ray.train.worker import WorkerOrder, train_worker
from simclr_ray.views.make import how_views_are_made
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


def pretrain(config: ConfigSource = None, overrides: Sequence[str] = ()) -> RunResult:
    """Train an encoder; run it again with the same `run.folder` and it continues where it stands.

    Args:
        config: A YAML file, a mapping, or a `Config`.
        overrides: Such as `["train.global_batch=512"]`, applied on top.

    Raises:
        ConfigError: a setting cannot work (before Ray starts).
        DataError: the data set is missing, broken or changed, or too many images were rejected.
        ClusterError: Ray, its resources or its workers failed for good.
        StorageError: the run folder cannot be read or written.
        NumericsError: the loss or a gradient is not finite.
    """
    settings = load_config(config, overrides)
    _require(settings)
    manifest = read_manifest(storage.normalise(str(settings.data.train)))
    derived = derive(settings, manifest)
    policy_of(settings.views)
    if settings.cluster.workers:
        check_world_size(settings.cluster.workers, derived)
    run, existed = open_run(settings, derived, manifest.fingerprint)
    console = Console(total_steps=derived.total_steps, run_folder=run.uri)
    newest = ckpt.load_newest(run.checkpoints, console.say)
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
        workers, use_gpu = resolve_workers(settings.cluster, ray.cluster_resources())
        check_world_size(workers, derived)
        parts = " + ".join(map(str, shares(derived, workers)))
        console.say(f"workers: {workers} on {'GPU' if use_gpu else 'CPU'}; per-rank share {parts} images")
        where, why = resolve_views(
            settings.views.where, settings.cluster, ray.cluster_resources(), workers=workers, use_gpu=use_gpu
        )
        console.say(f"views: {how_views_are_made(where)} ({why})")
        return _run(settings, manifest, derived, run, console, workers=workers, use_gpu=use_gpu, where=where)


def _require(config: Config) -> None:
    missing = [
        name for name, value in (("run.folder", config.run.folder), ("data.train", config.data.train)) if not value
    ]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be set", fix=f"add --set {missing[0]}=FOLDER")


def _run(
    config: Config,
    manifest: Manifest,
    derived: Derived,
    run: RunFolder,
    console: Console,
    *,
    workers: int,
    use_gpu: bool,
    where: Where,
) -> RunResult:
    desk = beside_the_driver(Desk).remote((run.info() or {}).get("attempts", 0))
    trainer = _trainer(config, manifest, derived, run, desk, workers=workers, use_gpu=use_gpu, where=where)
    run.update(status="running", workers=workers)
    keeper = _Keeper(run, desk, console)
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:  # handed to the driver's thread below
            outcome.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    status = "failed"
    try:
        with console:
            thread.start()
            while thread.is_alive():
                thread.join(POLL_S)
                keeper.look()
        keeper.look()
        error, fatal = outcome[0], ray.get(desk.fatal.remote())
        if error is not None or fatal is not None:
            raise _explain(error, fatal, config) from error
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        console.say("interrupted; run the same command again to continue from the newest checkpoint")
        raise
    finally:
        run.update(status=status, attempts=keeper.attempts)
    return RunResult(run.uri, derived.total_steps, keeper.last)


def _trainer(
    config: Config,
    manifest: Manifest,
    derived: Derived,
    run: RunFolder,
    desk: Any,
    *,
    workers: int,
    use_gpu: bool,
    where: Where,
) -> ray.train.torch.TorchTrainer:
    configure_ray_data()
    cursor = beside_the_driver(SegmentCursor).remote()
    limits = limits_of(config.data)
    stream = unit_stream(
        PlanAddress(manifest.folder, manifest.fingerprint, config.run.seed),
        cursor,
        ViewStage(policy_of(config.views), config.run.seed, limits, where),
        unit_rows=derived.unit_rows,
        units_per_task=config.data.units_per_task,
    )
    resources = {"CPU": config.cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    order = WorkerOrder(config, derived, run, manifest.fingerprint, where, cursor, desk)
    return ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"order": order},
        datasets={"train": stream},
        dataset_config=ray.train.DataConfig(execution_options=execution_options(_bytes_ahead(config, derived))),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(config.cluster.collective_timeout_s)
        ),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            # Ray resumes a run by name; ours resumes by its own checkpoints, so each start gets a fresh name.
            name=f"start-{(run.info() or {}).get('attempts', 0) + 1:04d}-{ray.get_runtime_context().get_job_id()}",
            storage_path=run.path("ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=config.cluster.max_failures, controller_failure_limit=config.cluster.max_failures
            ),
        ),
    )


def _bytes_ahead(config: Config, derived: Derived) -> int:
    """Memory for the steps that the stream may be ahead, and for a few tasks' output at least, or it would stutter."""
    size = policy_of(config.views).size
    unit_bytes = derived.unit_rows * 2 * 3 * size * size
    units = max(config.data.steps_ahead * derived.units_per_step, 4 * config.data.units_per_task)
    return units * unit_bytes


class _Keeper:
    """Reads the desk: shows records, keeps the quarantine and the count of attempts in the run folder."""

    def __init__(self, run: RunFolder, desk: Any, console: Console) -> None:
        self._run, self._desk, self._console = run, desk, console
        self._quarantine = {entry["sample_id"]: entry for entry in read_quarantine(run)}
        self.attempts = int((run.info() or {}).get("attempts", 0))
        self.last: Mapping[str, float] = {}

    def look(self) -> None:
        """Take what came in."""
        news: News = ray.get(self._desk.collect.remote())
        for sentence in news.sentences:
            self._console.say(sentence)
        for record in news.records:
            self._console.progress(record)
            self.last = record.values
        if news.attempts != self.attempts:
            self.attempts = news.attempts
            self._run.update(attempts=news.attempts)
        fresh = {entry["sample_id"]: entry for entry in news.rejected if entry["sample_id"] not in self._quarantine}
        if fresh:
            self._quarantine |= fresh
            write_quarantine(self._run, list(self._quarantine.values()))


def _explain(error: BaseException | None, fatal: SimclrError | None, config: Config) -> SimclrError:
    """The user's error behind what Ray raised, or a sentence about Ray's own."""
    cause = fatal or root_cause(error)
    if cause is not None:
        return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ClusterError(
        f"training stopped: {lines[-1] if lines else type(error).__name__}",
        where="Ray Train",
        expected=f"at most {config.cluster.max_failures} restarts (cluster.max_failures)",
        fix="run the same command again to continue from the newest checkpoint; Ray's logs are in its session folder",
    )
