"""The tables of a report: what was measured, and the images that could not be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from simclr_ray import storage
from simclr_ray.data.quarantine import Entry
from simclr_ray.errors import SimclrError
from simclr_ray.publish.evaluated import result_tables
from simclr_ray.publish.record import RunRecord
from simclr_ray.train.run import RunFolder, read_quarantine

EXAMPLES_OF_EACH_REASON = 25
MOST_EXAMPLES = 400


def results_sections(record: RunRecord) -> list[Mapping[str, Any]]:
    """The tables of `evaluate`, the run's own test set first; none where the run was not evaluated."""
    sections: list[Mapping[str, Any]] = []
    for table in result_tables(record.evaluated):
        facts = [f"Checkpoint of step {'?' if table.step is None else table.step}"]
        if table.test:
            facts.append(f"test set {table.test}")
        stale = table.step is not None and record.step > table.step
        late = f" The run has gone on since, to step {record.step:,}." if stale else ""
        about = "; ".join([*facts, *table.measures]) + "." + late
        sections.append({"title": table.title, "header": table.header, "rows": table.rows, "about": about})
    return sections


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
