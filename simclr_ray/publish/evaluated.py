"""What `evaluate` left in a run's `eval/`, for reports, lists and cards: on the run's own test set and on others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from simclr_ray import storage
from simclr_ray.errors import DataError, SimclrError
from simclr_ray.evaluate.intervals import percent
from simclr_ray.evaluate.protocols import PROTOCOLS_NAME
from simclr_ray.train.run import RunFolder

T = TypeVar("T")
PROBES, SUPERVISED = "results.json", PROTOCOLS_NAME
_MEASURES = (
    ("knn_top1", "kNN %", 100, 1),
    ("rankme", "RankMe", 1, 1),
    ("alignment", "alignment", 1, 3),
    ("uniformity", "uniformity", 1, 3),
    ("contrastive_accuracy", "contrastive acc %", 100, 1),
)


@dataclass(frozen=True)
class Evaluated:
    """The measurements on one test set."""

    name: str = ""
    """`evaluate.name`, the folder below `eval/`; empty for the run's own."""
    probes: Mapping[str, Any] = field(default_factory=dict)
    """`results.json`; empty where no probe ran."""
    supervised: Mapping[str, Any] = field(default_factory=dict)
    """`protocols.json`: classifiers trained with labels; empty where none was."""


_NOTHING: Mapping[str, Any] = {}


def read_probes(run: RunFolder, notes: list[str]) -> tuple[Evaluated, ...]:
    """The probes on the run's own test set alone, by one request.

    Raises:
        StorageError: the store refuses or fails.
    """
    return (Evaluated(probes=read_or_note(run, f"eval/{PROBES}", _mapping, _NOTHING, notes)),)


def read_evaluated(run: RunFolder, notes: list[str]) -> tuple[Evaluated, ...]:
    """The run's own measurements first, also if there are none, then those of other sets by name.

    Raises:
        StorageError: the store refuses or fails.
    """
    folders, _ = storage.list_level(run.path("eval"))
    names = ["", *(uri.rstrip("/").rpartition("/")[2] for uri in folders)]
    found = []
    for name in names:
        place = f"eval/{name}" if name else "eval"
        probes, supervised = (
            read_or_note(run, f"{place}/{file}", _mapping, _NOTHING, notes) for file in (PROBES, SUPERVISED)
        )
        if not name or probes or supervised:
            found.append(Evaluated(name, probes, supervised))
    return tuple(found)


@dataclass(frozen=True)
class ResultTable:
    """A table of measurements, and what is to be said of it."""

    title: str
    """Empty for the run's own test set."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Texts, of strangers too (names of lists)."""
    step: int | None
    """Checkpoint that was measured."""
    test: str
    """The test set, without what a signed address grants; empty where it is not known."""
    measures: Sequence[str]
    """How they were taken."""
    other_weights: bool = False
    """Whether they are of classifiers that were trained from the encoder on, and not of the encoder."""


def result_tables(evaluated: Sequence[Evaluated]) -> list[ResultTable]:
    """What was measured, in the given order: of each set the probes' table, then that of trained classifiers."""
    tables = []
    for one in evaluated:
        for said, table in ((one.probes, _probes_table), (one.supervised, _supervised_table)):
            if rows_of(said):
                (header, rows, measures), step, test = table(said), said.get("step"), said.get("test")
                tables.append(ResultTable(
                    f"Transfer: {one.name}" if one.name else "", header, rows,
                    step if isinstance(step, int) else None, storage.tellable(str(test)) if test else "", measures,
                    other_weights=said is one.supervised,
                ))  # fmt: skip
    return tables


def rows_of(numbers: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of one of the files; what is no row is left out."""
    rows = numbers.get("rows")
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def read_or_note(
    run: RunFolder, name: str, parse: Callable[[bytes], T], default: T, notes: list[str], *, absent: str | None = None
) -> T:
    """A file of the run; one that cannot be understood is a note.

    Raises:
        StorageError: the store refuses or fails.
    """
    try:
        return parse(storage.read_bytes(run.path(name)))
    except FileNotFoundError:
        if absent:
            notes.append(absent)
    except (DataError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        said = str(error) if isinstance(error, SimclrError) else f"{type(error).__name__}: {error}"
        notes.append(f"{name} cannot be read: {said}")
    return default


def _mapping(data: bytes) -> Mapping[str, Any]:
    return dict(json.loads(data))


_Table = tuple[list[str], list[list[str]], list[str]]
"""Header, rows, and what is said of their measures."""


def _probes_table(said: Mapping[str, Any]) -> _Table:
    """Of the representations: with the interval that the probes' seeds leave the mean in."""
    rows = rows_of(said)
    budgets = list(dict.fromkeys(budget for row in rows for budget in _probes(row)))
    header = ["", "kNN %", *(f"linear %, {budget}" for budget in budgets), *(words for _, words, _, _ in _MEASURES[1:])]
    body = []
    for row in rows:
        measures = [_number(row.get(key), scale, digits) for key, _, scale, digits in _MEASURES]
        probes = [_probe(_probes(row).get(budget)) for budget in budgets]
        body.append([str(row.get("name", "-")), measures[0], *probes, *measures[1:]])
    about = [f"kNN with k = {said['knn_k']}"] if said.get("knn_k") else []
    seeds = said.get("seeds")
    if isinstance(seeds, list) and len(seeds) > 1:
        about.append(f"linear: mean and 95 % interval over {len(seeds)} probe seeds (one pretraining)")
    return header, body, about


def _supervised_table(said: Mapping[str, Any]) -> _Table:
    """Of classifiers trained with labels: with the interval that their seeds leave the mean in."""
    body = []
    for row in rows_of(said):
        values, labels = row.get("values"), row.get("labels")
        body.append([
            f"{row.get('protocol', '-')}, {row.get('part', '-')}",
            f"{labels:,}" if isinstance(labels, int) else "-",
            percent(_values(values)),
            str(len(_values(values))),
            _number(row.get("seconds"), 1, 0),
        ])  # fmt: skip
    header = ["trained with labels", "labels", "top-1 %, 95 % interval over seeds", "seeds", "seconds"]
    return header, body, []


def _probes(row: Mapping[str, Any]) -> Mapping[str, Any]:
    probes = row.get("linear")
    return probes if isinstance(probes, Mapping) else {}


def number_of(value: object) -> float | None:
    """A finite number of a file, or None for anything else."""
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _number(value: object, scale: float, digits: int) -> str:
    number = number_of(value)
    return "-" if number is None else f"{scale * number:.{digits}f}"


def _probe(summary: object) -> str:
    return percent(_values(summary.get("values"))) if isinstance(summary, Mapping) else "-"


def _values(found: object) -> list[float]:
    """The numbers of a list; what is none is left out."""
    numbers = [number_of(one) for one in found] if isinstance(found, list) else []
    return [one for one in numbers if one is not None]
