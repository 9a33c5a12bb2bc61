"""The numbers of a rank between two records: gathered every step without a host sync, agreed on, written by rank 0."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.data.decode import REASONS
from simclr_ray.errors import DataError, NumericsError, SimclrError
from simclr_ray.observe.metrics import JsonlSink, Record, Recorder, Sink, TensorBoardSink, truncate_after
from simclr_ray.train.batches import StepBatch
from simclr_ray.train.derive import Derived
from simclr_ray.train.run import RunFolder
from simclr_ray.train.step import STEP_METRICS, StepNumbers

COLLAPSED_SIMILARITY = 0.99
"""Mean cosine similarity of projections of different images; a healthy one is near 0, an initial one below 0.9."""


def collapse(step: int, negative_similarity: float) -> str | None:
    """A sentence where projections of different images all point the same way; None where they do not."""
    if negative_similarity < COLLAPSED_SIMILARITY:
        return None
    return (
        f"projections have collapsed at step {step}: those of different images have a cosine similarity of "
        f"{negative_similarity:.4f}"
    )


def is_straggler(waits: Sequence[float], elapsed: float) -> bool:
    """Whether one rank's wait for images is more than three times the others', and a tenth of the time at least.

    Args:
        waits: Seconds that each rank waited.
        elapsed: Seconds in which they did.
    """
    if len(waits) < 2:
        return False
    *others, worst = sorted(waits)
    return worst > 0.1 * elapsed and worst > 3 * median(others)


class TooManyRejectedError(DataError):
    """The limit on rejected images was passed; every rank finds it at the same step."""


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    rejected_total: int
    """Images rejected so far."""
    animated_total: int
    """Images so far that were the first of several frames."""


class StepLog:
    """See the module. Every rank has one and calls `write` at the same steps."""

    def __init__(
        self, config: Config, derived: Derived, run: RunFolder, desk: Any, *,
        rank: int, device: torch.device, attempt: int, start: Position,
    ) -> None:  # fmt: skip
        self._config, self._derived, self._run, self._desk = config, derived, run, desk
        self._device, self._attempt = device, attempt
        self._numbers: list[StepNumbers] = []
        self._waits: list[float] = []
        self._rejected: list[tuple[int, int, int]] = []
        self._animated = 0
        self.rejected_total, self.animated_total = start.rejected_total, start.animated_total
        self._window = [_window_before(start, config)]  # (samples, rejected) of each record
        self._warned = self._collapsed = False
        self._stall_s: float | None = None
        self._written_s: float | None = None
        self._metrics = _MetricsFile(run, start.step) if rank == 0 else None
        self._since, self._since_step = time.monotonic(), start.step

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics:
            self._metrics.close()

    def take(self, batch: StepBatch, numbers: StepNumbers) -> None:
        """Remember one step."""
        self._numbers.append(numbers)
        self._waits.append(batch.wait_s)
        self._rejected += [(sample, reason, batch.step) for sample, reason in batch.rejected]
        self._animated += batch.animated

    def upload_of_now(self) -> Callable[[], None]:
        """What must be done before a checkpoint of this moment is committed: no committed step lacks its record.

        May be called later and in another thread; what it uploads is of now.
        """
        return self._metrics.upload_of_now() if self._metrics else _nothing

    def stood_still(self, stall_s: float, written_s: float | None) -> None:
        """Note the time of a save: it is not a step's, so it is kept out of the next record's step time.

        Args:
            stall_s: The steps were held up for.
            written_s: The save before took, in its thread; None if it has not ended yet.
        """
        self._stall_s = (self._stall_s or 0.0) + stall_s
        self._written_s = written_s if written_s is not None else self._written_s
        self._since += stall_s

    def write(self, step: int, learning_rate: float, checkpoint_age_s: float | None = None) -> None:
        """Agree on what all ranks saw and write one record. Called on every rank at the same steps."""
        if not self._numbers:  # all its steps were left out
            self._waits.clear()
            return
        means = torch.stack([numbers.values for numbers in self._numbers]).mean(dim=0)
        waits, (rejected, animated) = self._agree(sum(self._waits), len(self._rejected), self._animated)
        waited = max(waits)
        now, steps = time.monotonic(), step - self._since_step
        elapsed, samples = max(now - self._since, 1e-9), steps * self._config.train.global_batch
        self.rejected_total += rejected
        self.animated_total += animated
        self._report_rejected()
        values = dict(zip(STEP_METRICS, means.tolist(), strict=True))
        values |= {
            "train/learning_rate": learning_rate,
            "train/temperature": self._config.loss.temperature,
            "train/epoch": self._derived.epoch_at(step),
            "data/wait_s": waited / steps,
            "data/wait_fraction": min(1.0, waited / elapsed),
            "data/images_per_s": samples / elapsed,
            "data/rejected_total": float(self.rejected_total),
            "data/animated_total": float(self.animated_total),
            "time/step_s": elapsed / steps,
        }
        if checkpoint_age_s is not None:
            values["time/checkpoint_age_s"] = checkpoint_age_s
        if self._stall_s is not None:
            values["time/checkpoint_stall_s"] = self._stall_s
        if self._written_s is not None:
            values["time/checkpoint_s"] = self._written_s
        self._stall_s = self._written_s = None
        if self._device.type == "cuda":
            values["gpu/peak_mib"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        self._warn_of_straggler(waits, elapsed)
        if self._metrics:
            record = Record(step, step * self._config.train.global_batch, self._attempt, time.time(), values)
            self._metrics.log(record)
            self._desk.post.remote(record)
        self._numbers.clear()
        self._waits.clear()
        self._animated = 0
        self._since, self._since_step = now, step
        self._refuse_rejected(samples, rejected)
        self._refuse_collapse(step, values["train/negative_similarity"])

    def _agree(self, waited_s: float, *counts: int) -> tuple[list[float], list[int]]:
        """How long each rank waited for images, and each count of images over all of them."""
        waits = torch.zeros(dist.get_world_size(), device=self._device)
        waits[dist.get_rank()] = waited_s
        totals = torch.tensor(counts, device=self._device)
        dist.all_reduce(waits, dist.ReduceOp.SUM)
        dist.all_reduce(totals, dist.ReduceOp.SUM)
        return waits.tolist(), totals.tolist()

    def _warn_of_straggler(self, waits: Sequence[float], elapsed: float) -> None:
        """Name a rank that alone keeps the others waiting for its images; told once an attempt."""
        slowest = max(range(len(waits)), key=waits.__getitem__)
        if not self._warned and is_straggler(waits, elapsed) and self._metrics:
            self._warned = True
            others = median(wait for rank, wait in enumerate(waits) if rank != slowest)
            self._desk.say.remote(
                f"rank {slowest} is slow in data: it waited {waits[slowest]:.1f} s of {elapsed:.1f} s for its images, "
                f"the others {others:.1f} s; look at its node's network and object store"
            )

    def _refuse_collapse(self, step: int, negative_similarity: float) -> None:
        """Say once, or stop, when projections of different images cannot be told apart."""
        told = collapse(step, negative_similarity)
        if told and self._config.train.stop_on_collapse:
            raise NumericsError(
                told, expected=f"below {COLLAPSED_SIMILARITY}",
                fix="lower optim.base_learning_rate, or look at `simclr-ray preview`: are the views all alike?",
            )  # fmt: skip
        if told and not self._collapsed and self._metrics:
            self._desk.say.remote(f"ALARM: {told}; training goes on (train.stop_on_collapse)")
        self._collapsed = self._collapsed or told is not None

    def _report_rejected(self) -> None:
        if self._rejected:
            entries = [
                {"sample_id": sample, "reason": REASONS[reason], "step": step}
                for sample, reason, step in self._rejected
            ]
            self._desk.reject.remote(entries)
            self._rejected.clear()

    def _refuse_rejected(self, samples: int, rejected: int) -> None:
        """Stop when too much of the newest window could not be used; every rank has the same counts.

        Before a window is full, once so many are lost that no other image of it could make up for them.
        """
        data = self._config.data
        self._window.append((samples, rejected))
        while len(self._window) > 1 and sum(n for n, _ in self._window[1:]) >= data.rejected_window:
            self._window.pop(0)
        seen, bad = (sum(column) for column in zip(*self._window, strict=True))
        if bad > data.max_rejected_fraction * max(seen, min(data.rejected_window, self._derived.samples)):
            raise TooManyRejectedError(
                f"{bad} of the last {seen} images could not be used",
                where=data.train,
                expected=f"at most {data.max_rejected_fraction:.2%} (data.max_rejected_fraction)",
                fix=f"see the reasons in {self._run.path('quarantine.parquet')}",
            )


def _window_before(start: Position, config: Config) -> tuple[int, int]:
    """Samples and rejected ones that the attempts before leave in the window: of a longer past, its average."""
    seen = start.step * config.train.global_batch
    kept = min(seen, config.data.rejected_window)
    return kept, round(start.rejected_total * kept / seen) if seen else 0


class _MetricsFile:
    """`metrics.jsonl` and TensorBoard of rank 0. Object stores cannot append: there a copy goes up at each save."""

    def __init__(self, run: RunFolder, start_step: int) -> None:
        self._uri, self._local = run.metrics, storage.is_local(run.uri)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        path = Path(self._uri)
        if not self._local:
            self._scratch = tempfile.TemporaryDirectory()
            path = Path(self._scratch.name) / "metrics.jsonl"
            with contextlib.suppress(FileNotFoundError):
                path.write_bytes(storage.read_bytes(self._uri))
        truncate_after(path, start_step)
        self._path = path
        sinks: list[Sink] = [JsonlSink(path)]
        if self._local:
            with contextlib.suppress(SimclrError):  # an extra that need not be installed
                sinks.append(TensorBoardSink(run.path("tensorboard"), resumed_from=start_step or None))
        self._recorder = Recorder(sinks)

    def log(self, record: Record) -> None:
        self._recorder.log(record)

    def upload(self) -> None:
        self.upload_of_now()()

    def upload_of_now(self) -> Callable[[], None]:
        if self._local:
            return _nothing
        data = self._path.read_bytes()
        return lambda: _written(self._uri, data)

    def close(self) -> None:
        self._recorder.close()
        if self._scratch:
            self.upload()
            self._scratch.cleanup()


def _nothing() -> None:
    pass


def _written(uri: str, data: bytes) -> None:
    storage.write_bytes(uri, data)
