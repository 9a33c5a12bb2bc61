"""`runs`: lists and compares run folders, local or in a store, by reading what they say; there is no server."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from simclr_ray import storage
from simclr_ray.errors import ConfigError
from simclr_ray.publish.describe import comparable_losses, settings_table
from simclr_ray.publish.record import RunRecord, iso, labels_of, read_record

DEPTH = 4
"""Levels below a folder in which runs are looked for, the folder itself among them."""
_READERS = 8

Measure = Literal["linear_top1", "knn_top1", "loss", "rankme"]
MEASURES: dict[Measure, bool] = {"linear_top1": True, "knn_top1": True, "loss": False, "rankme": True}
"""What runs are ranked by, and whether more is better."""


@dataclass(frozen=True)
class RunSummary:
    """One line of a list; None where a run has no such number."""

    run: str
    """URI of the folder."""
    status: str
    step: int
    total_steps: int | None
    images_seen: int
    loss: float | None
    """NT-Xent, the last record's."""
    knn_top1: float | None
    """Fraction, of the newest evaluation."""
    linear_top1: float | None
    """Fraction, mean over probe seeds."""
    rankme: float | None
    wait_fraction: float | None
    """Of the step time, over the whole run."""
    worker_hours: float
    last_record: str
    """Time in UTC."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find_runs(folders: Sequence[str]) -> list[str]:
    """Run folders at or below the given ones, each once, in the order found; a run's own folders are not looked into.

    Raises:
        ConfigError: a folder holds none.
        StorageError: a store refuses or fails.
    """
    found: dict[str, None] = {}
    for folder in folders:
        uri = storage.normalise(folder)
        runs = list(_below(uri, DEPTH))
        if not runs:
            raise ConfigError(
                "no run here, nor in the folders below", where=uri, expected=f"run.json at most {DEPTH - 1} levels down"
            )
        found |= dict.fromkeys(runs)
    return list(found)


def read_runs(folders: Sequence[str], *, whole: bool = False) -> list[RunRecord]:
    """Records of all runs at or below some folders.

    Args:
        folders: Where to look.
        whole: As for `read_record`.

    Raises:
        ConfigError: a folder holds none.
        StorageError: a store refuses or fails.
    """
    with ThreadPoolExecutor(_READERS, thread_name_prefix="runs") as pool:
        return list(pool.map(partial(read_record, whole=whole), find_runs(folders)))


def summary(record: RunRecord) -> RunSummary:
    """The numbers that lists show."""
    return RunSummary(
        record.uri,
        record.status,
        record.step,
        record.total_steps,
        record.images_seen,
        record.last("train/loss"),
        record.result("knn_top1"),
        record.result("linear_top1"),
        record.result("rankme"),
        record.mean("data/wait_fraction"),
        record.cost.worker_hours,
        iso(record.last_sign),
    )


def ranked(records: Sequence[RunRecord], by: Measure) -> list[RunSummary]:
    """The runs that have a measure, the best first.

    Raises:
        ConfigError: none has it, or theirs do not compare: losses of other temperatures or batches, accuracies on
            other test sets.
    """
    more, having = MEASURES[by], [(record, summary(record)) for record in records]
    having = [(record, one) for record, one in having if getattr(one, by) is not None]
    if not having:
        fix = "train for some steps" if by == "loss" else "run simclr-ray evaluate on them"
        raise ConfigError(f"none of the runs has {by}", got=f"{len(records)} runs", fix=fix)
    if by == "loss" and not comparable_losses([record for record, _ in having]):
        raise ConfigError(
            "losses of these runs do not compare: their temperatures, batches or flavours differ",
            fix="rank by linear_top1 or knn_top1, or name runs that share them",
        )
    tests = sorted({str(record.evaluation.get("test")) for record, _ in having}) if by != "loss" else []
    if len(tests) > 1:
        raise ConfigError("these runs were measured on different test sets", got=", ".join(tests),
                          fix="evaluate them on one, or name runs that share it")  # fmt: skip
    summaries = [one for _, one in having]
    return sorted(summaries, key=lambda one: -getattr(one, by) if more else getattr(one, by))


HEADER = ("run", "status", "steps", "loss", "kNN %", "linear %", "RankMe", "wait %", "worker-h", "last record")


def table_of(summaries: Sequence[RunSummary], labels: Sequence[str]) -> list[list[str]]:
    """Rows under `HEADER`."""
    return [
        [
            label,
            one.status,
            f"{one.step:,}" + (f"/{one.total_steps:,}" if one.total_steps else ""),
            _shown(one.loss, 1, 3),
            _shown(one.knn_top1, 100, 1),
            _shown(one.linear_top1, 100, 1),
            _shown(one.rankme, 1, 1),
            _shown(one.wait_fraction, 100, 1),
            f"{one.worker_hours:.2f}",
            one.last_record,
        ]
        for label, one in zip(labels, summaries, strict=True)
    ]


def differences(records: Sequence[RunRecord]) -> list[list[str]]:
    """Settings and derived numbers that are not the same in all runs: key, then each run's value."""
    table = settings_table(records, labels_of(records), None)
    return [[row["key"], *row["values"][1:]] for row in table["rows"] if row["differs"]]


def _below(uri: str, levels: int) -> Iterator[str]:
    folders, files = storage.list_level(uri)
    if any(one.uri.rpartition("/")[2] == "run.json" for one in files):
        yield uri
        return
    if levels > 1:
        for folder in folders:
            yield from _below(folder, levels - 1)


def _shown(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{scale * value:.{digits}f}"
