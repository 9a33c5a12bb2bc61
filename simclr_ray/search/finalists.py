"""Whether the winner won: the best trials and the given configuration, trained again by seeds of their own.

The best of many noisy trials is in part the luckiest, so the scores that chose it say too much of it; these do not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simclr_ray.search.objective import WORST
from simclr_ray.search.record import TrialRecord, ranked
from simclr_ray.search.space import SearchSpec

GIVEN = "as given"


@dataclass(frozen=True)
class Finalist:
    """One configuration and what its repetitions gave; more is better."""

    name: str
    """Of its trial, or `as given`."""
    settings: Mapping[str, Any]
    values: tuple[float, ...]
    """The objective, a seed each; failed ones are left out."""
    failed: int = 0

    @property
    def mean(self) -> float:
        """Over the seeds; NaN where all failed."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds; NaN for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def choose(
    records: Sequence[TrialRecord], measure: str, count: int, *, but: Mapping[str, Any] | None = None
) -> list[TrialRecord]:
    """The best trials, best first, no two of the same settings; trials without a finite score are none.

    Args:
        records: All trials.
        measure: The objective.
        count: At most so many.
        but: Settings that are trained again anyway: the given configuration's.
    """
    chosen: list[TrialRecord] = []
    known = [dict(but)] if but else []
    for one in ranked(records, measure):
        if len(chosen) < count and one.objective(measure) > WORST and dict(one.settings) not in known:
            chosen.append(one)
            known.append(dict(one.settings))
    return chosen


def cases(chosen: Sequence[tuple[str, Mapping[str, Any]]], spec: SearchSpec, seed: int) -> list[tuple[str, Any]]:
    """Name and settings of each repetition; seeds that the search itself did not train with."""
    everyone = [(GIVEN, {}), *chosen]
    return [
        (f"{name.replace(' ', '-')}-seed-{seed + repetition}", {**settings, "run.seed": seed + repetition})
        for name, settings in everyone
        for repetition in range(1, spec.seeds + 1)
    ]


def summarise(
    chosen: Sequence[tuple[str, Mapping[str, Any]]], records: Sequence[TrialRecord], measure: str
) -> list[Finalist]:
    """Finalists, best mean first, those of which a seed failed behind; those that failed throughout last."""
    found = []
    for name, settings in ((GIVEN, {}), *chosen):
        mine = [one for one in records if one.name.startswith(name.replace(" ", "-") + "-seed-")]
        values = [one.objective(measure) for one in mine]
        good = tuple(value for value in values if value > WORST)
        found.append(Finalist(name, settings, good, len(mine) - len(good)))
    return sorted(found, key=lambda one: (bool(one.values), not one.failed, one.mean), reverse=True)


def verdict(finalists: Sequence[Finalist]) -> str:
    """Whether the first one's lead over the second exceeds their spread over seeds, in words."""
    good = [one for one in finalists if one.values]
    whole = [one for one in good if not one.failed]
    if whole and len(whole) < len(good):
        aside = ", ".join(one.name for one in good if one.failed)
        return f"{verdict(whole)}; set aside, for a seed of theirs failed: {aside}"
    if not good:
        return "no finalist could be trained again; nothing is known of the winner but its one score"
    if len(good) < 2:
        return f"{good[0].name} is the only finalist that could be trained again"
    first, second = good[:2]
    lead = first.mean - second.mean
    if math.isnan(first.spread) or math.isnan(second.spread):
        return (
            f"{first.name} leads {second.name} by {lead:.4g}; with {len(first.values)} and {len(second.values)} seeds, "
            "nobody knows whether that is more than chance"
        )
    spread = math.sqrt((first.spread**2 + second.spread**2) / 2)
    words = "exceeds" if lead > spread else "does not exceed"
    end = "" if lead > spread else ": take them for equal, or repeat with more seeds"
    return (
        f"{first.name} leads {second.name} by {lead:.4g}, which {words} the spread over "
        f"{min(len(first.values), len(second.values))} seeds, {spread:.4g}{end}"
    )
