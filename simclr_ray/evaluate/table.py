"""The result table: what the encoder learned, beside the baselines that say what it is worth.

Pure formatting: rows in, text out. The rows belong together: raw pixels (what the data gives away for free), the same
encoder untrained (what the architecture gives), the trained encoder (what the training gave).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from simclr_ray.evaluate.intervals import percent
from simclr_ray.evaluate.linear import ProbeSummary

MISSING = "-"


@dataclass(frozen=True)
class EvaluationRow:
    """Every measure of one representation; None where it was not taken or has no meaning."""

    name: str
    """Such as "raw pixels", "random encoder", "trained encoder"."""
    knn_top1: float | None = None
    """Fraction, 0 to 1."""
    linear: Mapping[str, ProbeSummary] = field(default_factory=dict)
    """Probe summaries by the labels they used, such as "all labels" or "100 labels": a column each."""
    rankme: float | None = None
    alignment: float | None = None
    uniformity: float | None = None
    contrastive_accuracy: float | None = None
    """Fraction, 0 to 1."""


def to_text(rows: Sequence[EvaluationRow]) -> str:
    """Write the table as aligned plain text: a header, a rule, a line a row."""
    header, *body = _cells(rows)
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(_aligned(line, widths) for line in (header, rule, *body))


def to_markdown(rows: Sequence[EvaluationRow]) -> str:
    """Write the table as Markdown."""
    header, *body = _cells(rows)
    return markdown(header, body)


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Lay cells out as Markdown; the first column is flush left, the others flush right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in (header, rule, *body))


def _cells(rows: Sequence[EvaluationRow]) -> list[list[str]]:
    """Lay the table out as text cells, header first. Probe columns come in the order of their first mention."""
    budgets = list(dict.fromkeys(labels for row in rows for labels in row.linear))
    probes = [f"linear %, {labels}" for labels in budgets] or ["linear %"]
    header = ["", "kNN %", *probes, "RankMe", "alignment", "uniformity", "contrastive acc %"]
    body = [
        [
            row.name,
            _number(row.knn_top1, scale=100, digits=1),
            *([_probe(row.linear.get(labels)) for labels in budgets] or [MISSING]),
            _number(row.rankme, digits=1),
            _number(row.alignment, digits=3),
            _number(row.uniformity, digits=3),
            _number(row.contrastive_accuracy, scale=100, digits=1),
        ]
        for row in rows
    ]
    return [header, *body]


def _number(value: float | None, *, scale: float = 1.0, digits: int) -> str:
    return MISSING if value is None or math.isnan(value) else f"{scale * value:.{digits}f}"


def _probe(summary: ProbeSummary | None) -> str:
    return MISSING if summary is None else percent(summary.values)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()


def _markdown(cell: str) -> str:
    """Keep a stranger's name inside its cell."""
    return " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|")
