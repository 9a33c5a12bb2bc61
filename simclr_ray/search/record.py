"""What is known of a trial, in one file of its folder: its settings, its lives, its scores and how it ended.

The file is the truth of the search: tables, the page and the finalists are made from these, not from Tune's state.
While a trial runs, only its own process writes it; the driver writes into it after that process has ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from simclr_ray import storage
from simclr_ray.search.objective import WORST, better_is_more

FILE = "trial.json"
ALL = 1 << 62
"""Images that a whole trial counts as having seen: batches that do not divide an epoch end a little apart."""
Status = Literal["running", "finished", "stopped early", "failed"]


@dataclass(frozen=True)
class Place:
    """A checkpoint."""

    run: str
    """Run folder."""
    step: int


@dataclass(frozen=True)
class Generation:
    """One life of a trial: a training by one set of values. Only population-based training begins a second."""

    run: str
    """Its run folder."""
    settings: Mapping[str, Any]
    origin: Place | None = None
    """Where it began; None from initial weights."""


@dataclass(frozen=True)
class Score:
    """One measured checkpoint."""

    step: int
    generation: int
    samples_seen: int
    measures: Mapping[str, float]
    seconds: float
    """Of training since the trial's process began, as far as it waited; for people."""


@dataclass
class TrialRecord:
    """A trial, whole."""

    name: str
    generations: list[Generation] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    status: Status = "running"
    why: str = ""
    """What ended it, in words."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of its newest life."""
        return self.generations[-1].settings if self.generations else {}

    def life(self, folder: str, settings: Mapping[str, Any], pointer: Place | None) -> Generation:
        """The life that goes on, or a new one where the trial was given other values or another's checkpoint.

        Args:
            folder: Of the trial.
            settings: Its values now.
            pointer: Where it was told to go on from; None where nothing was scored.
        """
        if self.generations:
            mine = self.generations[-1]
            begun_already = pointer in (None, mine.origin) or (pointer is not None and pointer.run == mine.run)
            if mine.settings == settings and begun_already:
                return mine
        run = storage.join(folder, f"gen-{len(self.generations) + 1}")
        self.generations.append(Generation(run, settings, pointer))
        return self.generations[-1]

    def objective(self, measure: str) -> float:
        """Its last score, more is better; worst where there is none, or where it failed."""
        if not self.scores or self.status == "failed":
            return better_is_more(measure, None)
        return better_is_more(measure, self.scores[-1].measures.get(measure))

    def standing(self, measure: str) -> tuple[bool, int, float]:
        """What trials are ranked by, more is better: any score, then how far it was trained, then its objective.

        One that was ended early is behind all whole ones, whatever it scored: measures without labels need not rise
        while a network learns.
        """
        seen = ALL if self.status == "finished" else self.scores[-1].samples_seen if self.scores else 0
        objective = self.objective(measure)
        return objective > WORST, seen, objective

    def both(self, measure: str, also: str) -> tuple[float, float]:
        """Its last score by two measures, more is better."""
        return self.objective(measure), self.objective(also)

    def write(self, folder: str) -> None:
        """Write it into the trial's folder."""
        values = asdict(self)
        for score in values["scores"]:  # JSON knows no NaN
            score["measures"] = {k: v if math.isfinite(v) else None for k, v in score["measures"].items()}
        storage.write_bytes(storage.join(folder, FILE), json.dumps(values, indent=1, allow_nan=False).encode())


def read_record(folder: str) -> TrialRecord | None:
    """A trial's record; None where it never began."""
    try:
        values = json.loads(storage.read_bytes(storage.join(folder, FILE)))
    except FileNotFoundError:
        return None
    generations = [
        Generation(one["run"], one["settings"], Place(**one["origin"]) if one["origin"] else None)
        for one in values["generations"]
    ]
    scores = [
        Score(**one | {"measures": {k: math.nan if v is None else v for k, v in one["measures"].items()}})
        for one in values["scores"]
    ]
    return TrialRecord(values["name"], generations, scores, values["status"], values["why"])


@dataclass(frozen=True)
class ScoresBefore:
    """The objectives that a trial had when a search was continued, oldest first; more is better."""

    folder: str
    """Of the trials."""
    measure: str

    def __call__(self, name: str) -> list[float]:
        """Of one trial; none of a new one."""
        record = read_record(storage.join(self.folder, name))
        if record is None:
            return []
        found = [better_is_more(self.measure, one.measures.get(self.measure)) for one in record.scores]
        return [*found, WORST] if record.status == "failed" else found


def read_records(folder: str) -> list[TrialRecord]:
    """All trials of a folder, in the order of their names."""
    found = [read_record(storage.join(folder, name)) for name in sorted(storage.list_names(folder))]
    return [one for one in found if one is not None]


def ranked(records: Sequence[TrialRecord], measure: str) -> list[TrialRecord]:
    """Best first; see `TrialRecord.standing`."""
    return sorted(records, key=lambda one: one.standing(measure), reverse=True)
