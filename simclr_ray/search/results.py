"""What a search leaves in its folder: the best configuration, a table of all scores, and sentences for people."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import load_config, to_yaml
from simclr_ray.search.finalists import Finalist
from simclr_ray.search.objective import LOWER_IS_BETTER, WORST, agreement, unbeaten
from simclr_ray.search.record import TrialRecord, ranked
from simclr_ray.search.space import LABELLED, MEASURES, Settings
from simclr_ray.train.run import absolute

SHOWN = 20
"""Trials in the console's table."""
FEW = 4
"""Trials below which a rank correlation is not worth a line."""


def write_best(folder: str, config: Config, settings: Settings) -> str:
    """Write `best.yaml`, which `pretrain` takes as it is; its run goes into `best/` of the search.

    Args:
        folder: Of the search.
        config: As given.
        settings: The winner's.

    Returns:
        Where it is.
    """
    values = absolute(config).model_dump(mode="json", exclude_unset=True)
    chosen = {**settings, "run.folder": storage.join(folder, "best")}
    best = load_config(values, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])
    uri = storage.join(folder, "best.yaml")
    storage.write_bytes(uri, to_yaml(best.model_dump(mode="json", exclude_unset=True)).encode())
    return uri


def write_table(folder: str, records: Sequence[TrialRecord], keys: Sequence[str]) -> str:
    """Write `trials.parquet`: a row for each score, and one for a trial that has none.

    Columns: `trial`, `status`, `why`, `generation`, `step`, `samples_seen`, `seconds`, the keys of the space, and the
    measures. Values of choices that are of several types are written as their JSON.
    """
    rows: list[dict[str, Any]] = []
    for one in records:
        about = {"trial": one.name, "status": one.status, "why": one.why}
        if not one.scores:
            rows.append(about | {key: one.settings.get(key) for key in keys})
        for score in one.scores:
            settings = one.generations[score.generation - 1].settings
            rows.append(
                about
                | {"generation": score.generation, "step": score.step, "samples_seen": score.samples_seen}
                | {"seconds": score.seconds}
                | {key: settings.get(key) for key in keys}
                | dict(score.measures)
            )
    names = ["trial", "status", "why", "generation", "step", "samples_seen", "seconds", *keys, *MEASURES]
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    uri = storage.join(folder, "trials.parquet")
    storage.write_bytes(uri, buffer.getvalue())
    return uri


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([json.dumps(value) for value in values])


def trial_rows(
    records: Sequence[TrialRecord], keys: Sequence[str], measure: str, also: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the console's table, best first; stars for trials unbeaten in two objectives."""
    objectives = [measure, also] if also else [measure]
    header = ["trial", *(key.partition(".")[2] for key in keys), "step", *map(named, objectives), "status"]
    stars = {one.name for one in front(records, measure, also)} if also else set()
    rows = []
    for one in ranked(records, measure)[:SHOWN]:
        last = one.scores[-1] if one.scores else None
        values = [shown(last.measures.get(name)) if last else "-" for name in objectives]
        settings = (shown(one.settings.get(key)) for key in keys)
        status = f"{one.status} *" if one.name in stars else one.status
        rows.append([one.name, *settings, str(last.step) if last else "-", *values, status])
    return header, rows


def front(records: Sequence[TrialRecord], measure: str, also: str) -> list[TrialRecord]:
    """Whole trials that no other beats in both, best by the first measure first; of all where none is whole."""
    scored = [one for one in ranked(records, measure) if min(one.both(measure, also)) > WORST]
    scored = [one for one in scored if one.status == "finished"] or scored
    flags = unbeaten([one.both(measure, also) for one in scored])
    return [one for one, kept in zip(scored, flags, strict=True) if kept]


def front_lines(records: Sequence[TrialRecord], measure: str, also: str | None) -> list[str]:
    """What the stars mean; none without a second objective."""
    if also is None or not (found := front(records, measure, also)):
        return []
    names = ", ".join(one.name for one in found)
    return [f"* no trial beats these {len(found)} in both {named(measure)} and {named(also)}: {names}"]


def finalist_rows(
    finalists: Sequence[Finalist], keys: Sequence[str], measure: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the finalists' table."""
    header = ["trained again", *(key.partition(".")[2] for key in keys), named(measure), "seeds"]
    sign = -1 if measure in LOWER_IS_BETTER else 1
    rows = []
    for one in finalists:
        spread = "" if math.isnan(one.spread) else f" +- {shown(one.spread)}"
        failed = f" ({one.failed} failed)" if one.failed else ""
        values = [shown(one.settings.get(key, "given")) for key in keys]
        rows.append([one.name, *values, shown(sign * one.mean) + spread, f"{len(one.values)}{failed}"])
    return header, rows


def named(measure: str) -> str:
    """A measure with its direction, where less is better."""
    return f"{measure} (less is better)" if measure in LOWER_IS_BETTER else measure


def shown(value: Any) -> str:
    """A value for a table."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return "-" if value is None else str(value)


def failures(records: Sequence[TrialRecord]) -> list[str]:
    """A line for each trial that failed."""
    return [f"trial {one.name} failed: {' '.join(one.why.split())[:300]}" for one in records if one.status == "failed"]


def label_free_lines(records: Sequence[TrialRecord]) -> list[str]:
    """How well each label-free measure ranked the trials against the labelled ones; none without labels."""
    whole = [one for one in records if one.status == "finished" and one.scores]
    compared, which = (whole, "trials of full length") if len(whole) >= FEW else (
        [one for one in records if one.scores and one.status != "failed"], "trials, of unequal length",
    )  # fmt: skip
    lasts: list[Mapping[str, float | None]] = [one.scores[-1].measures for one in compared]
    if len(compared) < FEW or not all(LABELLED[0] in one for one in lasts):
        return []
    found = {labelled: agreement(lasts, labelled) for labelled in LABELLED}
    lines = [f"rank correlation (Spearman) of what needs no labels with what does, over {len(compared)} {which}:"]
    for name in found[LABELLED[0]]:
        values = ", ".join(f"{shown(found[labelled][name])} with {labelled}" for labelled in LABELLED)
        lines.append(f"  {name}: {values}")
    return lines
