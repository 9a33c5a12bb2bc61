"""`report`: one offline HTML file about one run, or about several beside each other.

Whatever a run has is shown; what it lacks (an evaluation, a data set that can be reached, a checkpoint) is said where
it would stand. The file appears whole or not at all, and replaces nothing but an older report.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_ray import storage
from simclr_ray.configure import ConfigSource, load_config, use_storage
from simclr_ray.errors import ConfigError, SimclrError, StorageError
from simclr_ray.publish import report_charts
from simclr_ray.publish.charts import COLOURS
from simclr_ray.publish.describe import comparable_losses, facts_of, settings_table
from simclr_ray.publish.looks import umap_class
from simclr_ray.publish.page import BEGIN, Page, render
from simclr_ray.publish.record import TRAINED, RunRecord, iso, labels_of, read_record
from simclr_ray.publish.report_images import look_section, views_section
from simclr_ray.publish.report_tables import quarantine_section, results_sections
from simclr_ray.version import __version__

MOST_EMBEDDED = 20_000


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows."""

    images: bool = True
    """Whether pictures of the data are in it; without, it has their numbers and names alone."""
    embedded: int = 800
    """Images that are embedded for the map and the neighbours; 0 leaves both out."""
    recipe: ConfigSource = None
    """A configuration to compare the runs' with, beside the defaults."""
    umap: bool = False
    """Whether there is a map by UMAP beside the principal components."""


def report(
    runs: Sequence[str],
    output: str = "report.html",
    *,
    images: bool = True,
    embedded: int = 800,
    umap: bool = False,
    recipe: ConfigSource = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Write a report about runs into one HTML file that needs no network.

    Args:
        runs: Run folders, local or s3://; finished or not, evaluated or not. At most 8.
        output: The file, local or s3://. An older report is replaced, any other file refused.
        images: Show pictures of the data. Without, no image is in the file; names of rejected ones are.
        embedded: Images for the map and the neighbours, up to 20,000; 0 leaves both out.
        umap: Draw a map by UMAP, too (extra `umap`).
        recipe: A configuration file to compare settings with.
        overrides: `storage.*` settings, to reach the runs.
        say: Told what is being done.

    Returns:
        The URI of the file.

    Raises:
        ConfigError: no run in a folder, too many of them, the output is a file of another kind, or a UMAP that cannot
            be had.
        StorageError: a store refuses or fails.
    """
    if umap and not embedded:
        raise ConfigError("a map needs images that are embedded", where="umap", got="embedded 0")
    if umap:
        umap_class()  # which may refuse: before anything is read
    if not 1 <= len(runs) <= COLOURS:
        raise ConfigError("a report is about some runs", got=f"{len(runs)} folders", expected=f"1 to {COLOURS}")
    if not 0 <= embedded <= MOST_EMBEDDED:
        raise ConfigError("so many images cannot be embedded", got=embedded, expected=f"0 to {MOST_EMBEDDED}")
    wrong = [text for text in overrides if not text.strip().startswith("storage.")]
    if wrong:
        raise ConfigError("only storage.* can be set here; the rest is the runs'", got=", ".join(wrong))
    settings = load_config(None, overrides)
    use_storage(settings)
    target = storage.normalise(output)
    version = refuse_another_kind(target)
    options = ReportOptions(images, embedded, load_config(recipe) if recipe is not None else None, umap)
    records = []
    for folder in runs:
        say(f"reading {folder}")
        records.append(read_record(folder))
    data = render(page_of(records, options, say))
    _publish(target, data, version)
    return target


def page_of(records: Sequence[RunRecord], options: ReportOptions, say: Callable[[str], None]) -> Page:
    """Everything that the page shows."""
    labels = labels_of(records)
    runs = [_of_run(record, label, colour, options, say)
             for colour, (record, label) in enumerate(zip(records, labels, strict=True))]  # fmt: skip
    many = len(records) > 1
    title = "Runs compared: " + ", ".join(labels) if many else f"Run {labels[0]}"
    return Page(
        title=title,
        subtitle=f"Written {iso(time.time())} by simclr-ray {__version__}. It needs no network, and holds "
        + ("pictures of the data set." if options.images else "no pictures of the data set."),
        footer="Numbers are those of metrics.jsonl, eval/ and run.json in the run folder" + ("s." if many else "."),
        runs=runs,
        learning=report_charts.learning(records, labels),
        learning_note=""
        if comparable_losses(records)
        else "Losses of these runs do not compare: their temperatures, batches or flavours differ.",
        health=report_charts.health(records, labels),
        input=report_charts.feeding(records, labels),
        settings=settings_table(records, labels, options.recipe),
        images=options.images,
        trained=TRAINED,
    )


def refuse_another_kind(target: str) -> str | None:
    """Version of the report that is there and may be replaced; None where nothing is.

    Raises:
        ConfigError: something else is there.
    """
    if storage.is_local(target) and Path(target).is_dir():
        raise ConfigError("the output is a folder", where=target, fix="give a file name with -o")
    try:
        data, version = storage.read_versioned(target)
    except FileNotFoundError:
        return None
    if not data.startswith(BEGIN):
        raise ConfigError("the file is there and is no report, so it is not replaced", where=target,
                          fix="give another name with -o")  # fmt: skip
    return version or storage.digest(data)


def _publish(target: str, data: bytes, version: str | None) -> None:
    """Put the report in place of what was found at the beginning, and of nothing else.

    Raises:
        StorageError: the store fails, or somebody else wrote the file meanwhile.
    """
    if version is None:
        done = storage.create_bytes(target, data)
    elif storage.can_swap(target):
        done = storage.replace_bytes(target, data, version=version) is not None
    else:
        storage.write_bytes(target, data)
        done = True
    if not done:
        raise StorageError("somebody else wrote this file meanwhile", where=target, fix="run the command again")


def _of_run(
    record: RunRecord, label: str, colour: int, options: ReportOptions, say: Callable[[str], None]
) -> Mapping[str, Any]:
    with _stores_of(record):
        views = views_section(record) if options.images else {"why": "", "shown": []}
        look = _look(record, label, options, say)
    bars, lines = report_charts.timeline(record)
    moods = {"finished": "finished", "running": "", "new": ""}
    return {
        "label": label,
        "uri": record.uri,
        "colour": colour,
        "status": record.status,
        "mood": moods.get(record.status, "bad"),
        "facts": facts_of(record),
        "notes": list(record.notes),
        "results": results_sections(record),
        "views": views,
        "look": look,
        "quarantine": quarantine_section(record),
        "timeline": bars,
        "timeline_notes": lines,
    }


@contextlib.contextmanager
def _stores_of(record: RunRecord) -> Iterator[None]:
    """Reach stores as the run does, unless the command says how; its images may lie where the run itself does not."""
    before = storage.current()
    if record.config is not None and before == storage.StorageSettings():
        use_storage(record.config)
    try:
        yield
    finally:
        if storage.current() != before:
            storage.configure(before)


def _look(record: RunRecord, label: str, options: ReportOptions, say: Callable[[str], None]) -> Mapping[str, Any]:
    if not options.embedded:
        return {"why": "Left out: no images were to be embedded."}
    if record.config is None:
        return {"why": "The run's settings cannot be read, so its encoder cannot be built."}
    say(f"embedding up to {options.embedded:,} images of {label}")
    try:
        return look_section(record, options.embedded, images=options.images, umap=options.umap)
    except SimclrError as error:
        return {"why": f"Not to be had: {error}"}
