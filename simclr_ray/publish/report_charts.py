"""The charts of a report: which metrics stand together, in which colour and unit, and when a run was at work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup

from simclr_ray.observe.console import duration
from simclr_ray.publish.charts import Axis, Series, line_chart, plane, spans
from simclr_ray.publish.evaluated import rows_of
from simclr_ray.publish.page import words
from simclr_ray.publish.record import TRAINED, RunRecord, iso
from simclr_ray.train.step_log import COLLAPSED_SIMILARITY

SEEN = Axis("images seen", low=0.0)
PERCENT = Axis("%", low=0.0, high=100.0)
_MOST_BARS = 40
_BASELINE = 6
"""Colour of what is there to compare with: gray."""


def learning(records: Sequence[RunRecord], labels: Sequence[str]) -> list[Markup]:
    """Loss, accuracy, learning rate and gradient norm."""
    accuracy = [
        *_series(records, labels, "train/contrastive_accuracy", scale=100, words_of="contrastive, training batch"),
        *_series(records, labels, "eval/knn_top1", scale=100, words_of="kNN, held out", dashed=True, points=True),
        *_series(records, labels, "eval/linear_top1", scale=100, words_of="linear, held out", dashed=True, points=True),
    ]
    charts = [
        _chart(records, _series(records, labels, "train/loss"), "NT-Xent loss", Axis("nat"), level=_chance(records)),
        _chart(records, accuracy, "Accuracy", PERCENT),
        _chart(records, _series(records, labels, "train/learning_rate"), "Learning rate", Axis("", low=0.0)),
        _chart(
            records, _series(records, labels, "train/grad_norm"), "Gradient norm, before clipping", Axis("", log=True)
        ),
    ]
    return [chart for chart in charts if chart]


def health(records: Sequence[RunRecord], labels: Sequence[str]) -> list[Markup]:
    """Whether projections stay apart, and where runs stand between alignment and uniformity."""
    similarity = [
        *_series(records, labels, "train/positive_similarity", words_of="positive pairs"),
        *_series(records, labels, "train/negative_similarity", words_of="negative pairs", dashed=True),
    ]
    lowest = min((value for one in similarity for value in one.y if math.isfinite(value)), default=0.0)
    cosine = Axis("", low=min(-0.1, lowest - 0.05), high=1.02)
    collapsed = (COLLAPSED_SIMILARITY, "negative pairs here: collapsed")
    charts = [
        _chart(records, similarity, "Cosine similarity of projections", cosine, level=collapsed),
        *_charts(
            records,
            labels,
            ("train/contrastive_entropy", "Entropy over candidates", Axis("nat")),
            ("repr/rankme", "RankMe while training", Axis("rank", low=1.0)),
        ),
        plane(
            _marks(records, labels),
            title="Alignment against uniformity, test set",
            x=Axis("uniformity (lower: more uniform)"),
            y=Axis("alignment (lower: closer)"),
        ),
    ]
    return [chart for chart in charts if chart]


def feeding(records: Sequence[RunRecord], labels: Sequence[str]) -> list[Markup]:
    """Speed, and the share of it that was spent waiting for images."""
    waited = _series(records, labels, "data/wait_fraction", scale=100)
    rejected = any(record.last("data/rejected_total") for record in records)
    charts = [
        _chart(records, waited, "Waiting for data", Axis("% of step time", low=0.0, high=100.0)),
        *_charts(
            records,
            labels,
            ("data/images_per_s", "Speed", Axis("images/s", low=0.0)),
            ("time/step_s", "Step time", Axis("s", low=0.0)),
            ("gpu/peak_mib", "Peak memory of rank 0's device", Axis("MiB", low=0.0)),
            *([("data/rejected_total", "Rejected images so far", Axis("images", low=0.0))] if rejected else []),
        ),
    ]
    return [chart for chart in charts if chart]


def _charts(records: Sequence[RunRecord], labels: Sequence[str], *wanted: tuple[str, str, Axis]) -> list[Markup]:
    """A chart each of (metric, title, axis)."""
    return [
        _chart(records, _series(records, labels, name, points=name.startswith("repr/")), title, axis)
        for name, title, axis in wanted
    ]


def timeline(record: RunRecord) -> tuple[Markup, list[str]]:
    """Bars of a run's attempts, and sentences about what bars do not show."""
    attempts = record.attempts
    if not attempts:
        return Markup(""), ["No attempt has left a record yet."]
    zero, last = attempts[0].began, attempts[-1].ended
    unit, name = (60.0, "minutes") if last - zero < 3 * 3600 else (3600.0, "hours")
    shown = attempts[-_MOST_BARS:]
    rows = [
        (
            f"#{one.number}", (one.began - zero) / unit, (one.ended - zero) / unit,
            f"attempt {one.number}: steps {one.first_step + 1:,} to {one.last_step:,}, {duration(one.seconds)}, "
            f"from {iso(one.began)}",
        )
        for one in shown
    ]  # fmt: skip
    bars = spans(rows, title="When the run was at work", x_title=f"{name} since {iso(zero)}")
    lines = [what for _, _, _, what in rows]
    gaps = [(a, b, b.began - a.ended) for a, b in pairwise(attempts)]
    lines += [f"between attempts {a.number} and {b.number}: {duration(gap)}" for a, b, gap in gaps[-_MOST_BARS:]]
    without = int(record.info.get("attempts", 0) or 0) - len(attempts)
    if without > 0:
        lines.append(f"{without} more of {record.info['attempts']} left no record, or their steps were done again.")
    left_out = record.info.get("left_out")
    if left_out:
        lines.append(f"Steps left out because their numbers were not finite: {', '.join(map(str, left_out))}.")
    if len(shown) < len(attempts):
        lines.append(f"Only the last {len(shown)} of {len(attempts)} are drawn.")
    return bars, lines


def _series(
    records: Sequence[RunRecord], labels: Sequence[str], name: str, *, scale: float = 1.0, words_of: str = "",
    dashed: bool = False, points: bool = False,
) -> list[Series]:  # fmt: skip
    """A metric of each run that recorded it."""
    found = []
    for colour, (record, label) in enumerate(zip(records, labels, strict=True)):
        kept = [one for one in (*record.records, *record.measured) if name in one.values]
        if not kept:
            continue
        told = words_of if len(records) == 1 else f"{label} {words_of}".strip()
        # A single run's two lines of one chart are told apart by colour too.
        paint = colour + (1 if dashed and len(records) == 1 else 0)
        x, y = [float(one.samples_seen) for one in kept], [scale * one.values[name] for one in kept]
        found.append(Series(words(told or label), x, y, paint, dashed, points))
    return found


def _chart(
    records: Sequence[RunRecord], series: Sequence[Series], title: str, y: Axis,
    *, level: tuple[float, str] | None = None,
) -> Markup:  # fmt: skip
    resumed = []
    if len(records) == 1:
        pairs = pairwise(records[0].records)
        resumed = [float(b.samples_seen) for a, b in pairs if b.attempt != a.attempt]
    return line_chart(series, title=title, x=SEEN, y=y, resumed=resumed, level=level)


def _chance(records: Sequence[RunRecord]) -> tuple[float, str] | None:
    """What the loss is when all similarities are equal: ln(2B - 1) for B images; twice that as Google has it."""
    chances = set()
    for record in records:
        if record.config is None:
            return None
        doubled = 2 if record.config.loss.flavour == "paper" else 1
        chances.add(doubled * math.log(2 * record.config.train.global_batch - 1))
    return (chances.pop(), "all similarities equal") if len(chances) == 1 else None


def _marks(records: Sequence[RunRecord], labels: Sequence[str]) -> list[tuple[str, float, float, int]]:
    """(name, uniformity, alignment, colour) of trained encoders, and of a single run's baselines."""
    marks = []
    for colour, (record, label) in enumerate(zip(records, labels, strict=True)):
        for row in rows_of(record.evaluation):
            place = _place(row)
            if place is not None:
                name = str(row.get("name", ""))
                if len(records) == 1:
                    marks.append((words(name), *place, 0 if name == TRAINED else _BASELINE))
                elif name == TRAINED:
                    marks.append((words(label), *place, colour))
    return marks


def _place(row: Mapping[str, object]) -> tuple[float, float] | None:
    across, up = row.get("uniformity"), row.get("alignment")
    return (float(across), float(up)) if isinstance(across, float) and isinstance(up, float) else None
