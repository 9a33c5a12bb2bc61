"""What a run folder says about its run, read once and without starting anything: the source of reports and lists.

A run may be unfinished, never evaluated, or of another version: what is missing or cannot be read becomes a note, and
everything else is there. Nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.errors import ConfigError
from simclr_ray.evaluate.online import online_records, parse_online
from simclr_ray.observe.console import duration
from simclr_ray.observe.metrics import Record, parse_jsonl
from simclr_ray.publish.evaluated import Evaluated, number_of, read_evaluated, read_or_note, read_probes, rows_of
from simclr_ray.train.lock import holder_of, is_alive
from simclr_ray.train.run import RunFolder, config_of

TRAINED = "trained encoder"
"""Name of the row of `eval/results.json` that is about what the run learned."""
UNFINISHED = ("new", "running")


@dataclass(frozen=True)
class Attempt:
    """One life of the worker group, as far as its records were kept."""

    number: int
    began: float
    """Unix time of its first step, worked out from its first record."""
    ended: float
    """Unix time of its last record."""
    first_step: int
    """Steps that were done before it."""
    last_step: int
    """Steps done at its last record that no later attempt did again."""

    @property
    def seconds(self) -> float:
        """From the first step to the last record."""
        return self.ended - self.began


@dataclass(frozen=True)
class Cost:
    """What the run took so far."""

    seconds: float
    """Of training, over all attempts; waits between them are not in it."""
    workers: int
    devices: str
    """`GPU` or `CPU`: what a worker is."""

    @property
    def worker_hours(self) -> float:
        """Hours times workers of the last start."""
        return self.seconds * self.workers / 3600


@dataclass(frozen=True)
class RunRecord:
    """Everything but images and weights."""

    uri: str
    info: Mapping[str, Any]
    """`run.json`."""
    config: Config | None = None
    """Resolved; None where it cannot be read."""
    derived: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    """Of `metrics.jsonl`, in the order of their steps."""
    measured: tuple[Record, ...] = ()
    """Of `eval/online.jsonl`: what was measured of checkpoints while training."""
    evaluated: tuple[Evaluated, ...] = (Evaluated(),)
    """What `evaluate` has measured; on the run's own test set first."""
    status: str = "unknown"
    notes: tuple[str, ...] = ()
    """What could not be read, a sentence each."""

    @property
    def name(self) -> str:
        """The folder's last part."""
        return self.uri.rstrip("/").rpartition("/")[2]

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """`eval/results.json`; empty where the run was not evaluated on its own test set."""
        return self.evaluated[0].probes

    @property
    def step(self) -> int:
        """Optimizer steps at the last record."""
        return self.records[-1].step if self.records else 0

    @property
    def total_steps(self) -> int | None:
        """Steps that the run is to have."""
        total = self.derived.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def images_seen(self) -> int:
        """At the last record."""
        return self.records[-1].samples_seen if self.records else 0

    @property
    def last_sign(self) -> float | None:
        """Unix time of the last record."""
        return self.records[-1].wall_s if self.records else None

    @property
    def attempts(self) -> list[Attempt]:
        """Those that left records."""
        return attempts_of(self.records)

    @property
    def cost(self) -> Cost:
        """What it took so far."""
        gpu = bool(self.config and self.config.cluster.use_gpu) or any("gpu/peak_mib" in r.values for r in self.records)
        seconds = sum(attempt.seconds for attempt in self.attempts)
        return Cost(seconds, _count(self.info.get("workers"), 1), "GPU" if gpu else "CPU")

    def last(self, name: str) -> float | None:
        """Newest finite value of a metric."""
        values = (record.values[name] for record in reversed(self.records) if name in record.values)
        return next((value for value in values if math.isfinite(value)), None)

    def mean(self, name: str) -> float | None:
        """Mean of a metric over the run's steps: each record weighs as the steps that it is about."""
        total = weight = 0.0
        before = 0
        for record in self.records:
            steps, before = record.step - before, record.step
            value = record.values.get(name, math.nan)
            if math.isfinite(value) and steps > 0:
                total, weight = total + steps * value, weight + steps
        return total / weight if weight else None

    def result(self, name: str) -> float | None:
        """A measure of the trained encoder, such as `knn_top1` or `linear_top1` (mean over seeds, most labels)."""
        row = next((row for row in rows_of(self.evaluation) if row.get("name") == TRAINED), {})
        if name == "linear_top1":
            probes = list(row.get("linear", {}).values()) if isinstance(row.get("linear"), Mapping) else []
            return number_of(probes[-1].get("mean")) if probes and isinstance(probes[-1], Mapping) else None
        return number_of(row.get(name))


def read_record(folder: str, *, whole: bool = True) -> RunRecord:
    """Read what a run folder, local or in a store, says.

    Args:
        folder: Of the run.
        whole: Without, only the probes on the run's own test set are read of what was measured: all that a list shows.

    Raises:
        ConfigError: no run here.
        StorageError: the store refuses or fails.
    """
    run = RunFolder(storage.normalise(folder))
    info = run.info()
    if info is None:
        raise ConfigError("no run here: run.json is missing", where=run.uri, fix="give the run.folder of a pretraining")
    notes: list[str] = []
    resolved: dict[str, Any] = read_or_note(
        run, "resolved.yaml", lambda data: dict(yaml.safe_load(data) or {}), {}, notes
    )
    config = None
    if resolved:
        try:
            config = config_of(resolved)
        except ConfigError as error:
            notes.append(f"resolved.yaml is of another version: {error}")
    records: list[Record] = read_or_note(
        run, "metrics.jsonl", lambda data: parse_jsonl(data, where=run.metrics), [], notes,
        absent=None if info.get("status") == "new" else "no metrics.jsonl yet, so there are no curves",
    )  # fmt: skip
    batch = config.train.global_batch if config else 0
    measured: list[Record] = read_or_note(
        run, "eval/online.jsonl", lambda data: online_records(parse_online(data), batch), [], notes
    )
    evaluated = read_evaluated(run, notes) if whole else read_probes(run, notes)
    return RunRecord(
        run.uri,
        info,
        config,
        resolved.get("derived") or {},
        tuple(sorted(records, key=lambda record: record.step)),
        tuple(measured) if config else (),
        evaluated,
        _status(run.uri, str(info.get("status", "unknown"))),
        tuple(notes),
    )


def attempts_of(records: Sequence[Record]) -> list[Attempt]:
    """Lives of the worker group, from the records that were kept; one whose every step was done again left none."""
    found: list[Attempt] = []
    for number in sorted({record.attempt for record in records}):
        own = [record for record in records if record.attempt == number]
        before = max((record.step for record in records if record.step < own[0].step), default=0)
        step_s = own[0].values.get("time/step_s", 0.0)
        lead = step_s * (own[0].step - before) if math.isfinite(step_s) else 0.0
        floor = found[-1].ended if found else -math.inf
        began = max(floor, own[0].wall_s - lead)
        found.append(Attempt(number, began, max(began, own[-1].wall_s), before, own[-1].step))
    return found


def labels_of(records: Sequence[RunRecord]) -> list[str]:
    """A short name for each run: the fewest last parts of their folders that tell them apart."""
    parts = [record.uri.rstrip("/").split("/") for record in records]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(one)} ({number})" for number, one in enumerate(parts, start=1)]


def iso(seconds: float | None) -> str:
    """A Unix time for people, in UTC."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _status(uri: str, said: str) -> str:
    """Whether a run that says that it is running does: its driver beats in `lock.json`."""
    if said not in UNFINISHED:
        return said
    holder = holder_of(uri)
    if holder is None:
        return "stopped without a word"
    return "running" if is_alive(holder) else f"stopped, no heartbeat for {duration(time.time() - holder.beaten)}"


def _count(value: object, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default
