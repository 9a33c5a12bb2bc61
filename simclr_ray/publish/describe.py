"""A run in words: what, when and at what cost, and which settings differ from others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, flat
from simclr_ray.observe.console import duration
from simclr_ray.publish.record import RunRecord, iso


def facts_of(record: RunRecord) -> list[tuple[str, str]]:
    """What, when, and at what cost."""
    cost, total = record.cost, record.total_steps
    facts = [("folder", record.uri)]
    if record.config:
        model, data = record.config.model, record.config.data
        width = f" {model.width}x" if model.width > 1 else ""
        facts.append(("encoder", f"{model.encoder}{width}, projections of {model.projection_dim} numbers"))
        samples = record.derived.get("samples")
        facts.append(("data", f"{samples:,} images, {data.train}" if isinstance(samples, int) else str(data.train)))
    facts.append(("started", str(record.info.get("created", "-")).replace("T", " ").replace("Z", " UTC")))
    facts.append(("last record", iso(record.last_sign)))
    facts.append(("steps", f"{record.step:,}" + (f" of {total:,} ({record.step / total:.0%})" if total else "")))
    epoch = record.last("train/epoch")
    seen = f"{record.images_seen:,}" + (f" ({epoch:.2f} epochs)" if epoch is not None else "")
    facts.append(("images seen", seen))
    if cost.seconds > 0:
        many = f"{cost.workers} {cost.devices} worker{'s' if cost.workers > 1 else ''}"
        facts.append(("cost", f"{duration(cost.seconds)} of training on {many}: {cost.worker_hours:.2f} worker-hours"))
        facts.append(("speed", f"{record.images_seen / cost.seconds:,.0f} images/s, waits included"))
    wait = record.mean("data/wait_fraction")
    if wait is not None:
        facts.append(("waited for data", f"{wait:.1%} of the step time"))
    for name, words, scale, form in (
        ("train/loss", "loss", 1, ".3f"),
        ("train/contrastive_accuracy", "contrastive accuracy", 100, ".1f"),
    ):
        value = record.last(name)
        if value is not None:
            facts.append((words, f"{scale * value:{form}}{' %' if scale == 100 else ' nat'}"))
    for name, words in (("knn_top1", "kNN"), ("linear_top1", "linear probe")):
        value = record.result(name)
        if value is not None:
            facts.append((words, f"{100 * value:.1f} %"))
    facts.append(("attempts", str(record.info.get("attempts", 0))))
    facts.append(("made by", f"simclr-ray {record.info.get('version', '?')}"))
    return facts


def settings_table(records: Sequence[RunRecord], labels: Sequence[str], recipe: ConfigSource) -> Mapping[str, Any]:
    """Settings of the runs that are not the defaults, or not the recipe's, or not the same in all."""
    defaults = _values(Config())
    given = _values(recipe) if isinstance(recipe, Config) else None
    runs = [_values(record.config) if record.config else {} for record in records]
    rows: list[Mapping[str, Any]] = []
    for key in defaults:
        if key == "run.folder":  # stands above, and is another for each run
            continue
        others = [_shown(one[key]) for one in ([defaults, given] if given else [defaults])]
        values = [_shown(run.get(key)) for run in runs]
        if len({*others, *values}) > 1:
            rows.append({"key": key, "values": [*others, *values], "differs": len({*others[1:], *values}) > 1})
    for key in dict.fromkeys(key for record in records for key in record.derived):
        values = [_shown(record.derived.get(key)) for record in records]
        blank = [""] * (2 if given else 1)
        rows.append({"key": f"derived: {key}", "values": [*blank, *values], "differs": len(set(values)) > 1})
    compared = "the recipe's and " if given else ""
    about = f"Settings that are not {compared}the defaults, then the numbers derived from them."
    if given:
        about += " Marked: what differs from the recipe" + (", or between runs." if len(records) > 1 else ".")
    elif len(records) > 1:
        about += " Marked: what differs between the runs."
    return {"about": about, "header": ["default", *(["recipe"] if given else []), *labels], "rows": rows}


def comparable_losses(records: Sequence[RunRecord]) -> bool:
    """Whether losses of the runs mean the same: their scale follows from temperature, batch and flavour."""
    scales = {
        (record.config.loss.temperature, record.config.train.global_batch, record.config.loss.flavour)
        if record.config
        else None
        for record in records
    }
    return len(scales) <= 1


def _values(source: ConfigSource) -> dict[str, Any]:
    assert isinstance(source, Config)
    return flat(source.model_dump(mode="json"))


def _shown(value: object) -> str:
    """A setting in words; paths are absolute, as the runs keep them."""
    if isinstance(value, str):
        return storage.normalise(value) if "/" in value else value
    return json.dumps(value)
