"""What one train worker (rank) does, from loading the newest checkpoint to committing the last.

The loop in `train_worker` is the whole story; everything that happens once in a while is a method of `StepLog` or a
function below. Randomness has no state here (views are addressed, the initial weights come from the seed), so a
checkpoint is weights, optimizer and a step number.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_ray.config import Config
from simclr_ray.data.manifest import read_manifest
from simclr_ray.data.plan import Segment
from simclr_ray.errors import ClusterError, DataError, NumericsError, StorageError, root_cause
from simclr_ray.learn.nt_xent import NTXent, distributed_nt_xent
from simclr_ray.learn.optim import learning_rate_at, make_optimizer
from simclr_ray.model.batch_norm import batch_norms, calibrating, keep_apart, synchronise_batch_norm
from simclr_ray.model.simclr import SimCLR
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.ahead import OneAhead
from simclr_ray.train.batches import Shares, StepBatch, step_batches
from simclr_ray.train.cluster import usable_cores
from simclr_ray.train.derive import Derived, policy_of
from simclr_ray.train.device import ViewsOnDevice
from simclr_ray.train.memory import out_of_memory
from simclr_ray.train.pulse import EVERY_S, RANK_0_EVERY_S, Pulse
from simclr_ray.train.run import RunFolder
from simclr_ray.train.saver import SavesFailedError, Verdict
from simclr_ray.train.saves import Saves
from simclr_ray.train.step import NON_FINITE, NonFiniteStepError, autocast_of, encoder_input, train_step
from simclr_ray.train.step_log import Position, StepLog, TooManyRejectedError
from simclr_ray.train.teacher import Teacher, labels_of_teacher, load_teacher, loss_from_teacher
from simclr_ray.views.stage import Where


@dataclass(frozen=True)
class WorkerOrder:
    """What the driver hands to every worker."""

    config: Config
    derived: Derived
    run: RunFolder
    manifest_fingerprint: str
    where: Where
    """Who does the colours of the views."""
    cursor: Any
    """`SegmentCursor` actor."""
    desk: Any
    """`Desk` actor, where ranks leave news for the driver."""
    units_per_block: int = 1
    """Units that the stream deals together."""
    left_out: frozenset[int] = frozenset()
    """Steps whose images are passed over, for they gave numbers that are not finite."""


def train_worker(loop_config: dict[str, Any]) -> None:
    """Train on this rank until the last step. Ray Train calls this on every rank of every attempt."""
    order: WorkerOrder = loop_config["order"]
    rank = ray.train.get_context().get_world_rank()
    here = ray.get_runtime_context()
    group = here.get_placement_group_id() or ""
    if not ray.get(order.desk.join.remote(rank, here.get_node_id(), group)):
        return  # a restart of Ray's that is not wanted any more; the driver knows why
    with Pulse(rank, order.desk) as pulse, _reported(order, pulse):
        _train(order, pulse)


def _train(order: WorkerOrder, pulse: Pulse) -> None:
    config, derived = order.config, order.derived
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    _set_threads(config, device)
    model, parallel = _models(config, device)
    optimizer = make_optimizer(
        config.optim.name, model, weight_decay=config.optim.weight_decay, momentum=config.optim.momentum
    )
    start = _restore(order, model, optimizer)
    first_step = next(step for step in itertools.count(start.step) if step not in order.left_out)
    attempt = _next_attempt(order.desk, rank)
    autocast, policy = autocast_of(config.train.precision, device), policy_of(config.views)
    step_log = StepLog(config, derived, order.run, order.desk, rank=rank, device=device, attempt=attempt, start=start)
    saves = Saves(order.run.checkpoints, config.train, derived.total_steps, order.desk, rank=rank, device=device)
    views_on_device = ViewsOnDevice(device, policy, seed=config.run.seed, where=order.where)
    ahead = OneAhead(_batches(order, rank, world_size, first_step=start.step), views_on_device.bring)
    teacher, labels = _teacher(config, device)

    def encode(views: Tensor) -> Tensor:
        images = encoder_input(views, policy, channels_last=config.train.channels_last)
        with autocast():
            outputs = cast(Tensor, parallel(images))
            return outputs if teacher is None else torch.cat([outputs, teacher(images)], dim=1)

    def fetch(step: int) -> None:
        pulse.at(step, "data")
        ahead.fetch()
        pulse.at(step, "compute")

    def step(batch: StepBatch, views: Tensor) -> None:
        micro_batches = torch.split(views, list(batch.micro_batches))
        if config.model.batch_norm == "frozen" and batch.step == 0:
            _calibrate(model, encode, micro_batches)
        with _offenders_named(batch, micro_batches, model, encode, order.desk):
            numbers = train_step(
                parallel,
                optimizer,
                micro_batches,
                encode=encode,
                loss_of=_loss(config, batch, first=batch.step == first_step)
                if teacher is None
                else loss_from_teacher(config, labels, batch.sample_ids),
                learning_rate=_learning_rate(order, batch.step),
                clip_gradient_norm=config.optim.clip_gradient_norm,
                meanwhile=functools.partial(fetch, batch.step),
            )
        step_log.take(batch, numbers)

    def state(steps: int) -> ckpt.Checkpoint:
        position = Position(steps, step_log.rejected_total, step_log.animated_total)
        return _state(order, position, model, optimizer, attempt)

    with step_log, saves:
        pulse.begin(on_answer=saves.listen, every_s=RANK_0_EVERY_S if rank == 0 else EVERY_S)
        pulse.at(start.step, "data")
        done = start.step
        try:
            for ready in ahead:
                batch = ready.batch
                pulse.at(batch.step, "compute")
                if batch.step not in order.left_out:
                    step(batch, ready.arrived())
                done = batch.step + 1
                if batch.step == first_step:  # what takes long once is behind: now, a silent rank is a lost one
                    dist.set_timeout(timedelta(seconds=config.cluster.collective_timeout_s))
                verdict = saves.agree(done)
                pulse.at(batch.step, "record")
                if verdict or done % config.train.log_every == 0:
                    step_log.write(done, _learning_rate(order, batch.step), saves.age_s())
                if Verdict.SAVE in verdict and rank == 0:
                    step_log.stood_still(*saves.save(state(done), first=step_log.upload_of_now()))
                if Verdict.STOP in verdict:
                    return
                pulse.at(done, "data")
        except Exception as error:
            if isinstance(root_cause(error), StorageError) and done > start.step:  # the images' store, not the run's
                saves.rescue(state(done), first=step_log.upload_of_now())
            raise


def _batches(order: WorkerOrder, rank: int, world_size: int, *, first_step: int) -> Iterator[StepBatch]:
    data, derived = order.config.data, order.derived
    shares = Shares(
        rank, world_size, derived.units_per_step, derived.units_per_micro_batch, derived.unit_rows,
        data.units_per_segment, data.prefetch_units, order.units_per_block,
    )  # fmt: skip

    def move_cursor(segment: Segment) -> None:
        if rank == 0:
            ray.get(order.cursor.move.remote(segment))

    return step_batches(
        ray.train.get_dataset_shard("train"), move_cursor, shares, first_step=first_step, last_step=derived.total_steps
    )


def _loss(config: Config, batch: StepBatch, *, first: bool) -> Callable[[Tensor], NTXent]:
    """NT-Xent of a step. In an attempt's first, ranks compare what they hold; later the plan's numbers are trusted."""
    return functools.partial(
        distributed_nt_xent,
        temperature=config.loss.temperature,
        images=None if first else batch.images_by_rank,
        flavour=config.loss.flavour,
        exchange=config.loss.exchange,
        kernel=config.loss.kernel,
    )


def _teacher(config: Config, device: torch.device) -> tuple[Teacher | None, np.ndarray | None]:
    """What `distill` learns from: a teacher, and labels by sample id where some are seen; none in a pretraining."""
    if config.distill.teacher is None:
        return None, None
    teacher = load_teacher(config.distill).to(device)
    if config.distill.labels == "none":
        return teacher, None
    return teacher, labels_of_teacher(teacher, read_manifest(str(config.data.train)))


def _calibrate(model: SimCLR, encode: Callable[[Tensor], Tensor], micro_batches: Sequence[Tensor]) -> None:
    """Take the statistics of frozen batch norms from the run's first batch; a resumed run has them already."""
    with calibrating(model):
        for views in micro_batches:
            encode(views)


def _learning_rate(order: WorkerOrder, step: int) -> float:
    return learning_rate_at(
        step,
        peak=order.derived.peak_learning_rate,
        warmup_steps=order.derived.warmup_steps,
        total_steps=order.derived.total_steps,
        schedule=order.config.optim.schedule,
    )


def _set_threads(config: Config, device: torch.device) -> None:
    """Ray starts workers with one compute thread; a CPU worker takes its fair part of the machine."""
    if device.type == "cuda":
        return
    local = max(1, ray.train.get_context().get_local_world_size())
    torch.set_num_threads(config.cluster.threads_per_worker or max(1, usable_cores() // local))


def _models(config: Config, device: torch.device) -> tuple[SimCLR, nn.Module]:
    """The model, and the same wrapped for data parallelism (and compiled, where asked)."""
    from simclr_ray.train.build import build_model  # here, for timm takes seconds and driver and controller need none

    model = build_model(config)
    if config.model.batch_norm != "local":  # frozen ones are calibrated on all ranks together
        kind = "cuda" if device.type == "cuda" else "cpu"
        synchronise_batch_norm(model, device_type=kind)  # type: ignore[arg-type]
    model = model.to(device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.train()
    if config.model.batch_norm == "frozen":
        for norm in batch_norms(model):
            norm.eval()
    # Statistics of global batch norm are equal on all ranks by construction; local ones are saved from rank 0.
    parallel: nn.Module = DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )
    if config.train.compile:
        parallel = torch.compile(parallel)  # type: ignore[assignment]
    return model, parallel


def _restore(order: WorkerOrder, model: SimCLR, optimizer: torch.optim.Optimizer) -> Position:
    """Load the newest valid checkpoint on every rank and return where it stands.

    Rank 0 chooses, for two ranks that list the folder at different moments could choose differently.
    """
    rank = dist.get_rank()
    found = ckpt.load_newest(order.run.checkpoints, _teller(order.desk)) if rank == 0 else None
    chosen: list[Any] = [found.step if found else None]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return Position(0, 0, 0)
    state = found or ckpt.load(order.run.checkpoints, chosen[0])
    if state.facts.get("manifest") != order.manifest_fingerprint:
        raise DataError(
            "the checkpoint was made from another data set",
            where=order.run.uri,
            got=str(state.facts.get("manifest")),
            expected=order.manifest_fingerprint,
        )
    model.load_state_dict(state.model)
    ckpt.restore_optimizer(optimizer, state.optimizer)
    if rank == 0:
        _teller(order.desk)(f"continuing from the checkpoint of step {state.step}")
    return _position(state)


def _position(state: ckpt.Checkpoint) -> Position:
    """Where a checkpoint stands; older ones know of no animated images."""
    return Position(state.step, int(state.facts["rejected_total"]), int(state.facts.get("animated_total", 0)))


def _next_attempt(desk: Any, rank: int) -> int:
    number = [ray.get(desk.begin_attempt.remote()) if rank == 0 else None]
    dist.broadcast_object_list(number, src=0)
    assert number[0] is not None
    return int(number[0])


def _state(
    order: WorkerOrder, position: Position, model: SimCLR, optimizer: torch.optim.Optimizer, attempt: int
) -> ckpt.Checkpoint:
    """What a checkpoint of this moment holds; the tensors are the living ones."""
    facts = {
        "manifest": order.manifest_fingerprint,
        "samples_seen": position.step * order.config.train.global_batch,
        "rejected_total": position.rejected_total,
        "animated_total": position.animated_total,
        "attempt": attempt,
    }
    return ckpt.Checkpoint(position.step, ckpt.model_tensors(model), ckpt.optimizer_tensors(optimizer), facts)


def _teller(desk: Any) -> Callable[[str], None]:
    return lambda text: ray.get(desk.say.remote(text))


@contextlib.contextmanager
def _offenders_named(
    batch: StepBatch, micro_batches: Sequence[Tensor], model: SimCLR, encode: Callable[[Tensor], Tensor], desk: Any
) -> Iterator[None]:
    """Say which images give projections that are not finite; all ranks come here together, or none.

    They are found by one more forward pass, under the weights that were not changed, with statistics of batch norm that
    are no image's: in the batch's own, one image that is not finite makes all others so. The model is of no use after.
    """
    try:
        yield
    except NumericsError as error:
        ends = np.cumsum(batch.micro_batches)[:-1]
        mine: list[int] = []
        keep_apart(model)
        with torch.no_grad():
            for views, of_views in zip(micro_batches, np.split(batch.sample_ids, ends), strict=True):
                finite = torch.isfinite(encode(views)).all(dim=1).view(2, -1).all(dim=0)
                mine += of_views[~finite.cpu().numpy()].tolist()
        found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, mine)
        ids = sorted(one for of_rank in found for one in of_rank)
        if ids and dist.get_rank() == 0:
            desk.reject.remote([{"sample_id": one, "reason": NON_FINITE, "step": batch.step} for one in ids])
        raise NonFiniteStepError(batch.step, error, ids) from None


@contextlib.contextmanager
def _reported(order: WorkerOrder, pulse: Pulse) -> Iterator[None]:
    """Leave a user's error with the driver before it ends this rank: it would fail the same way at every restart.

    What all ranks found together ends them normally, so Ray does not even try again. Anything else must kill the
    group, for the other ranks may be waiting in a collective.
    """
    desk = order.desk
    try:
        yield
    except (NumericsError, TooManyRejectedError) as error:
        ray.get(desk.fail.remote(error))
    except torch.OutOfMemoryError as error:
        workers = ray.train.get_context().get_world_size()
        ray.get(desk.fail.remote(out_of_memory(error, order.derived, at=str(pulse.note()), workers=workers)))
        raise
    except Exception as error:
        cause = root_cause(error)
        passes = cause is None or isinstance(cause, (ClusterError, StorageError))
        if cause is not None and (not passes or isinstance(cause, SavesFailedError)):
            ray.get(desk.fail.remote(cause))
        elif passes:
            ray.get(desk.stumble.remote(pulse.note(), _first_line(cause or error)))
        raise


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
