"""What a run records about itself: one table of metric names, and the places (sinks) a record goes to.

The truth is `metrics.jsonl`: one object a line, written by rank 0. Everything else (TensorBoard, the console, the
pictures) can be rebuilt from it. Nothing here knows Ray, ranks or tensors: a record is plain numbers.

Invariants: a line counts once its newline is on disk; a sink that fails is dropped and never stops training; a name
that is not in `METRICS` is a bug of ours and raises at the first use.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from simclr_ray.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """What a metric means, in one line, and the unit of its values (empty: a pure number)."""

    help: str
    unit: str = ""


METRICS: Mapping[str, Metric] = {
    "train/loss": Metric("NT-Xent loss, mean over the anchors of the global batch", "nat"),
    "train/contrastive_accuracy": Metric("anchors whose most similar candidate is their own positive", "fraction"),
    "train/contrastive_entropy": Metric("entropy of an anchor's softmax over its candidates, mean", "nat"),
    "train/positive_similarity": Metric("cosine similarity of positive pairs, mean"),
    "train/negative_similarity": Metric("cosine similarity of negative pairs, mean"),
    "train/grad_norm": Metric("L2 norm of the whole gradient, before clipping"),
    "train/learning_rate": Metric("learning rate of the step, after schedule and scaling"),
    "train/temperature": Metric("temperature that divides the similarities"),
    "train/epoch": Metric("passes of the manifest, with the fraction of the current one", "epoch"),
    "data/wait_s": Metric("time a step waited for its images, mean since the last record", "s"),
    "data/wait_fraction": Metric("share of the step time spent waiting for images", "fraction"),
    "data/images_per_s": Metric("images consumed by all ranks, since the last record", "image/s"),
    "data/rejected_total": Metric("images that could not be used, since the start of the run", "image"),
    "data/animated_total": Metric("images that are the first of several frames, since the start of the run", "image"),
    "time/step_s": Metric("time of one optimizer step, waiting included, mean since the last record", "s"),
    "time/checkpoint_stall_s": Metric("time the step loop stood still for the last checkpoint", "s"),
    "time/checkpoint_s": Metric("time the last checkpoint took to be written, beside the training", "s"),
    "time/checkpoint_age_s": Metric("age of the newest checkpoint; before the first, of the attempt", "s"),
    "gpu/peak_mib": Metric("most memory held by tensors on rank 0's device since the start", "MiB"),
    "repr/rankme": Metric("effective rank of training images' embeddings (Garrido et al. 2023); of `evaluate.every`"),
    "eval/knn_top1": Metric("weighted nearest-neighbour accuracy, half asking half; of `evaluate.every`", "fraction"),
    "eval/linear_top1": Metric("linear-probe accuracy on the half it did not learn; of `evaluate.every`", "fraction"),
}
"""Every name a record may carry. Sinks, console and pictures take their wording from here."""


@dataclass(frozen=True)
class Record:
    """The numbers of one moment of a run."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Images consumed since the start of the run, by all ranks and attempts: the x-axis that survives a resize."""
    attempt: int
    """Which life of the worker group wrote this."""
    wall_s: float
    """Unix time of the record, in seconds."""
    values: Mapping[str, float]
    """Metric name to value; a value that is not finite is kept as NaN."""


class Sink(Protocol):
    """A place that takes records. It may raise: the `Recorder` contains the damage."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Write out what is buffered and let go."""


class Recorder:
    """Hands each record to every sink. Refuses unknown names; drops a sink that fails, with one warning."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def log(self, record: Record) -> None:
        """Send `record` to every sink that still works.

        Raises:
            KeyError: a name is not in `METRICS` (a bug of ours, so it must be loud).
        """
        check_names(record.values)
        for sink in tuple(self._sinks):
            try:
                sink.log(record)
            except Exception as error:
                self._drop(sink, error)

    def again(self) -> None:
        """Have sinks whose readers forget, which have `again`, say what they know once more; see `GaugeSink`."""
        for sink in tuple(self._sinks):
            try:
                getattr(sink, "again", lambda: None)()
            except Exception as error:
                self._drop(sink, error)

    def close(self) -> None:
        """Close every sink; a failure is a warning. May be called twice."""
        for sink in tuple(self._sinks):
            try:
                sink.close()
            except Exception as error:
                self._drop(sink, error)
        self._sinks.clear()

    def _drop(self, sink: Sink, error: Exception) -> None:
        self._sinks.remove(sink)
        log.warning("%s failed and gets no more records: %s: %s", type(sink).__name__, type(error).__name__, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_names(values: Mapping[str, float]) -> None:
    """Raise `KeyError`, with the nearest known name, unless every name is in `METRICS`."""
    for name in values:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise KeyError(f"unknown metric {name!r}{hint}: give it a line in simclr_ray/observe/metrics.py")


class JsonlSink:
    """Appends one JSON object a line and flushes it, so that a killed run keeps all but the line it was writing.

    The metric names stand beside the four fields of the record (`{"step": 10, ..., "train/loss": 3.2}`), which any
    data-frame library reads as columns. A value that is not finite is written as null: NaN is not JSON.
    """

    def __init__(self, target: str | os.PathLike[str] | TextIO) -> None:
        """Open a local path for appending (folders are made, a torn last line is cut), or take an open text stream."""
        if isinstance(target, (str, os.PathLike)):
            path = Path(target)
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            self._stream: TextIO = path.open("a", encoding="utf-8")
        else:
            self._stream = target

    def log(self, record: Record) -> None:
        """Append one line. Raises `OSError` when the disk does."""
        self._stream.write(_to_json(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


class TensorBoardSink:
    """Writes TensorBoard event files; the x-axis is the optimizer step.

    Steps, because TensorBoard's purge of a resumed run is by step. For curves of runs with different batch sizes use
    images seen: `metrics.jsonl` has both, and `simclr_ray.evaluate.pictures.curves` draws them.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resumed_from: int | None = None) -> None:
        """Open a writer in `folder`.

        Args:
            folder: a local folder; made when missing.
            resumed_from: the checkpoint's step; TensorBoard then hides what an earlier attempt wrote after it.

        Raises:
            ConfigError: the tensorboard package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "the TensorBoard sink needs the tensorboard package",
                got=str(error),
                fix="pip install simclr-ray[tensorboard], or leave this sink out",
            ) from error
        purge_step = None if resumed_from is None else resumed_from + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, record: Record) -> None:
        """Add one scalar a value."""
        for name, value in record.values.items():
            self._writer.add_scalar(name, value, global_step=record.step, walltime=record.wall_s)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Read the records of a `metrics.jsonl`, in file order; a torn last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a complete line is not a record; the message names the line.
    """
    return parse_jsonl(Path(path).read_bytes(), where=str(path))


def parse_jsonl(data: bytes, *, where: str) -> list[Record]:
    """`read_jsonl` of a file that was read already, such as one of an object store.

    Raises:
        DataError: a complete line is not a record; the message names the line of `where`.
    """
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # what follows the last newline is torn
        try:
            records.append(_from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "is not a metrics record",
                where=f"{where}, line {number}",
                got=f"{type(error).__name__}: {error}",
                expected="one JSON object with step, samples_seen, attempt, wall_s and values",
                fix="delete this line; the other lines stand on their own",
            ) from error
    return records


def truncate_after(path: str | os.PathLike[str], step: int) -> int:
    """Drop what an earlier attempt recorded after the checkpoint it now resumes from, so the curve has each step once.

    Also drops a torn last line and, with a warning, lines that are not records: a damaged log must not stop a resume.
    The file is replaced in one rename, so a kill leaves the old or the new file. No file is an empty file.

    Args:
        path: a local `metrics.jsonl` that nothing else has open.
        step: the checkpoint's step; records with a greater step go.

    Returns:
        How many complete lines were dropped.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = list(_complete_lines(path))
    kept = [line for number, line in enumerate(lines, start=1) if _keeps(line, step, where=f"{path}, line {number}")]
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return len(lines) - len(kept)


def _keeps(line: bytes, step: int, *, where: str) -> bool:
    try:
        return _from_json(line).step <= step
    except (ValueError, KeyError, TypeError):
        log.warning("%s: dropped, it is not a metrics record", where)
        return False


def _to_json(record: Record) -> str:
    values = {name: value if math.isfinite(value) else None for name, value in record.values.items()}
    head = {"step": record.step, "samples_seen": record.samples_seen, "attempt": record.attempt}
    return json.dumps(head | {"wall_s": record.wall_s} | values, allow_nan=False)


def _from_json(line: bytes) -> Record:
    """Parse one line; the inverse of `_to_json` but for infinities, which come back as NaN."""
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise TypeError(f"a JSON {type(fields).__name__}")
    values = {name: math.nan if value is None else float(value) for name, value in fields.items() if "/" in name}
    return Record(
        step=int(fields["step"]),
        samples_seen=int(fields["samples_seen"]),
        attempt=int(fields["attempt"]),
        wall_s=float(fields["wall_s"]),
        values=values,
    )


def _complete_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines that end in a newline, in bytes: a torn line may end inside a character."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _cut_torn_line(path: Path) -> None:
    """Cut what follows the last newline, so that the next record starts a line of its own."""
    if path.exists():
        complete = sum(map(len, _complete_lines(path)))
        if complete < path.stat().st_size:
            os.truncate(path, complete)
