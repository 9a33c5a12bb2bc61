"""The tables of a report: what was measured, and the images that could not be used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from simclr_ray import storage
from simclr_ray.data.quarantine import Entry
from simclr_ray.errors import SimclrError
from simclr_ray.publish.record import RunRecord, rows_of
from simclr_ray.train.run import RunFolder, read_quarantine

EXAMPLES_OF_EACH_REASON = 25
MOST_EXAMPLES = 400
_MEASURES = (
    ("knn_top1", "kNN %", 100, 1),
    ("rankme", "RankMe", 1, 1),
    ("alignment", "alignment", 1, 3),
    ("uniformity", "uniformity", 1, 3),
    ("contrastive_accuracy", "contrastive acc %", 100, 1),
)


def results_section(record: RunRecord) -> Mapping[str, Any] | None:
    """The table of `evaluate`, with the spread over seeds; None where the run was not evaluated."""
    rows = rows_of(record.evaluation)
    if not rows:
        return None
    budgets = list(dict.fromkeys(budget for row in rows for budget in _probes(row)))
    header = ["", "kNN %", *(f"linear %, {budget}" for budget in budgets), *(words for _, words, _, _ in _MEASURES[1:])]
    body = []
    for row in rows:
        measures = [_number(row.get(key), scale, digits) for key, _, scale, digits in _MEASURES]
        probes = [_probe(_probes(row).get(budget)) for budget in budgets]
        body.append([str(row.get("name", "-")), measures[0], *probes, *measures[1:]])
    said = record.evaluation
    seeds = said.get("seeds")
    about = [f"Checkpoint of step {said.get('step', '?')}"]
    if said.get("test"):
        about.append(f"test set {storage.tellable(str(said['test']))}")
    if said.get("knn_k"):
        about.append(f"kNN with k = {said['knn_k']}")
    if isinstance(seeds, list) and len(seeds) > 1:
        about.append(f"linear: mean and standard deviation over {len(seeds)} probe seeds (one pretraining)")
    stale = isinstance(said.get("step"), int) and record.step > said["step"]
    late = f" The run has gone on since, to step {record.step:,}." if stale else ""
    return {"header": header, "rows": body, "about": "; ".join(about) + "." + late}


def quarantine_section(record: RunRecord) -> Mapping[str, Any]:
    """Rejected images: counts by reason, and examples with their place and the decoder's words."""
    try:
        table = read_quarantine(RunFolder(record.uri))
    except (SimclrError, pa.ArrowException) as error:
        return {"why": f"quarantine.parquet cannot be read: {error}"}
    if table is None or not len(table):
        return {"why": "None: every image that the run met could be used."}
    counted = pc.value_counts(table["reason"]).to_pylist()
    reasons = sorted(((one["values"], one["counts"]) for one in counted), key=lambda pair: (-pair[1], pair[0]))
    examples = []
    for reason, _ in reasons:
        of_it = table.filter(pc.equal(table["reason"], reason))
        explained = of_it.filter(pc.not_equal(of_it["detail"], ""))
        shown = (explained if len(explained) else of_it).slice(0, EXAMPLES_OF_EACH_REASON)
        examples += [Entry(**row) for row in shown.to_pylist()]
    examples = examples[:MOST_EXAMPLES]
    rest = len(table) - len(examples)
    return {
        "why": "",
        "total": f"{len(table):,} image{'s' if len(table) > 1 else ''}",
        "reasons": [(reason, f"{count:,}") for reason, count in reasons],
        "examples": [
            {"reason": one.reason, "step": f"{one.step:,}", "name": _name(one), "detail": one.detail}
            for one in examples
        ],
        "more": f"{rest:,} more are in quarantine.parquet of the run folder." if rest > 0 else "",
    }


def _name(entry: Entry) -> str:
    """The original's address without what a signed one grants, or where it is stored."""
    return storage.tellable(entry.uri) if entry.uri else f"{storage.tellable(entry.shard)} row {entry.row}"


def _probes(row: Mapping[str, Any]) -> Mapping[str, Any]:
    probes = row.get("linear")
    return probes if isinstance(probes, Mapping) else {}


def _number(value: object, scale: float, digits: int) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{scale * value:.{digits}f}"


def _probe(summary: object) -> str:
    if not isinstance(summary, Mapping):
        return "-"
    mean, spread = _number(summary.get("mean"), 100, 1), _number(summary.get("spread"), 100, 1)
    return mean if spread == "-" else f"{mean} \N{PLUS-MINUS SIGN} {spread}"
