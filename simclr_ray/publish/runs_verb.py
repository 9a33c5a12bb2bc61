"""What `simclr-ray runs` prints: tables for people, or JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from simclr_ray.errors import ConfigError
from simclr_ray.observe.console import Console, duration
from simclr_ray.publish.describe import comparable_losses, facts_of
from simclr_ray.publish.record import RunRecord, iso
from simclr_ray.publish.report_tables import quarantine_section, results_sections
from simclr_ray.publish.runs import HEADER, Measure, RunSummary, differences, ranked, read_runs, summary, table_of

What = Literal["ls", "show", "best", "compare"]


def runs(what: What, folders: Sequence[str], *, by: Measure, as_json: bool, console: Console) -> None:
    """Print what is asked about the runs at or below some folders.

    Raises:
        ConfigError: no run there, too few to compare, or a ranking that would mean nothing.
        StorageError: a store refuses or fails.
    """
    records = read_runs(folders, whole=what == "show")
    place, names = _below([record.uri for record in records])
    summaries = ranked(records, by) if what == "best" else [summary(record) for record in records]
    if what == "compare" and len(records) < 2:
        raise ConfigError("there is nothing to compare", got="1 run", expected="2 or more", fix="name another folder")
    if as_json:
        _lines(what, records, summaries, console)
    elif what == "show":
        for record in records:
            _show(record, console)
    else:
        console.say(f"below {place}:")
        console.table(HEADER, table_of(summaries, [names[one.run] for one in summaries]))
    if what == "best" and not as_json:
        missing = len(records) - len(summaries)
        without = f"; {missing} without it are not listed" if missing else ""
        console.say(f"best first by {by}{without}: {summaries[0].run}")
        if by in ("linear_top1", "knn_top1"):
            console.say("chosen on its test set, so its accuracy there is no longer an honest estimate")
    if what == "compare" and not as_json:
        _compare(records, list(names.values()), console)


def _below(uris: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The folder that all runs lie below, and each run's path from there."""
    parts = [uri.split("/") for uri in uris]
    common = 0
    while all(len(one) > common + 1 and one[common] == parts[0][common] for one in parts):
        common += 1
    return "/".join(parts[0][:common]) or "/", {
        uri: "/".join(one[common:]) for uri, one in zip(uris, parts, strict=True)
    }


def _lines(what: What, records: Sequence[RunRecord], summaries: Sequence[RunSummary], console: Console) -> None:
    if what == "compare":
        for key, *values in differences(records):
            console.say(
                json.dumps({"setting": key, "values": dict(zip([r.uri for r in records], values, strict=True))})
            )
        return
    lines = [one.as_dict() for one in summaries]
    if what == "show":
        lines = [line | {"results": results_sections(one)} for line, one in zip(lines, records, strict=True)]
    for line in lines:
        console.say(json.dumps(line, allow_nan=False))


def _compare(records: Sequence[RunRecord], names: Sequence[str], console: Console) -> None:
    rows = differences(records)
    if not rows:
        console.say("all settings are the same")
        return
    console.say("")
    console.table(("differs", *names), rows)
    if not comparable_losses(records):
        console.say("their losses do not compare: temperature, batch or flavour differ")


def _show(record: RunRecord, console: Console) -> None:
    console.say(f"{record.name}: {record.status}")
    for name, value in facts_of(record):
        console.say(f"  {name}: {value}")
    for attempt in record.attempts:
        console.say(
            f"  attempt {attempt.number}: steps {attempt.first_step + 1:,} to {attempt.last_step:,}, "
            f"{duration(attempt.seconds)}, from {iso(attempt.began)}"
        )
    for results in results_sections(record):
        if results["title"]:
            console.say(str(results["title"]))
        console.table(results["header"], results["rows"])
        console.say(str(results["about"]))
    rejected = quarantine_section(record)
    if not rejected["why"]:
        console.say(f"  rejected: {', '.join(f'{count} {reason}' for reason, count in rejected['reasons'])}")
    for note in record.notes:
        console.say(f"  note: {note}")
