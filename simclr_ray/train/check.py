"""`simclr-ray check`: what a run would meet, found in seconds and said in plain sentences, before anything is paid for.

It reads some real units from the real store, decodes and augments them, takes one step's worth of the encoder on this
machine, and multiplies. A running cluster that is given is asked for its resources, versions, guard and disks
(`check_cluster`). No Ray is started, no training happens, and the run folder is written to only with a probe that is
deleted again.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from uuid import uuid4

import numpy as np
import torch

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, load_config, use_storage
from simclr_ray.data.decode import Rejected, decode, read_header
from simclr_ray.data.header import Header
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.plan import Plan, UnitTable
from simclr_ray.data.units import plan_tasks, read_planned
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.train import check_cluster
from simclr_ray.train.cluster import usable_cores
from simclr_ray.train.derive import Derived, bytes_ahead, check_world_size, derive, limits_of, policy_of, sentences
from simclr_ray.train.lock import LOCK_NAME
from simclr_ray.train.run import PROBE, identity, look_at_run, refuse_another
from simclr_ray.train.step import autocast_of, encoder_input
from simclr_ray.views.make import how_views_are_made
from simclr_ray.views.stage import Columns, ViewStage

SAMPLES = 64
"""Images that are decoded."""
UNITS = 8
"""Units that are read: as many places of the data set."""
DEADLINE_S = 10.0
"""Longest time for one operation of a store; whoever checks does not want to wait out an outage."""
_ENCODER_IMAGES = 8
_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Rates:
    """What was measured on a few units."""

    bytes_an_image: float
    requests_an_image: float
    views_s: float
    """CPU seconds of one core for the two views of an image, decoding included."""
    encoder_s: float
    """Seconds of this machine's device for forward and backward of an image's two views."""


def check(config: ConfigSource = None, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Yield findings, a sentence each, as they are found.

    Args:
        config: As for `pretrain`.
        overrides: On top.

    Raises:
        ConfigError: a setting cannot work, or the run folder cannot be used.
        DataError: the data set is missing, broken, or more of it is unusable than the limit allows.
        StorageError: a store refuses or does not answer.
        ClusterError: a cluster that is given does not answer, or cannot give what is asked.
    """
    settings = load_config(config, overrides)
    use_storage(settings)
    patient = storage.current()
    storage.configure(replace(patient, deadline_s=min(DEADLINE_S, patient.deadline_s)))
    try:
        yield from _findings(settings)
    finally:
        storage.configure(patient)


def _findings(settings: Config) -> Iterator[str]:
    if not settings.data.train:
        raise ConfigError("data.train must be set", fix="add --set data.train=FOLDER")
    folder = storage.normalise(settings.data.train)
    yield f"store of the images: {storage.describe(folder)}"
    started = time.monotonic()
    manifest = read_manifest(folder)
    yield from _about(manifest, time.monotonic() - started)
    derived = derive(settings, manifest)
    if settings.cluster.workers:
        check_world_size(settings.cluster.workers, derived)
    yield from sentences(settings, derived)
    if settings.run.folder:
        yield from _run_folder(settings, manifest, settings.run.folder)
    else:
        yield "run.folder is not set; pretrain will need it"
    if check_cluster.is_given(settings.cluster):
        yield from check_cluster.cluster_findings(settings, derived)
    rates = Rates(0, 0, 0, 0)
    for finding in _measure(settings, manifest):
        if isinstance(finding, Rates):
            rates = finding
        else:
            yield finding
    yield from _memory(settings, derived)
    yield from expected(settings, derived, rates, cores=usable_cores())


def _about(manifest: Manifest, seconds: float) -> Iterator[str]:
    kinds = Counter(manifest.table.text("kind", shard) for shard in range(len(manifest.shards)))
    words = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    size = int(manifest.table.bytes.sum()) / _GIB
    yield (
        f"data set: {manifest.rows:,} images in {len(manifest.shards):,} shards ({words}) of {size:,.2f} GiB, "
        f"fingerprint {manifest.fingerprint[:12]}, manifest read in {seconds:.1f} s"
    )


def _run_folder(config: Config, manifest: Manifest, folder: str) -> Iterator[str]:
    """Whether the folder can be written, and what is in it."""
    run = look_at_run(folder)
    yield f"store of the run: {storage.describe(run.uri)}"
    probe = run.path(f"{PROBE}{uuid4().hex[:12]}")
    storage.create_bytes(probe, b"")
    storage.delete_file(probe)
    info = run.info()
    if info is None:
        yield f"run folder: {run.uri} is new, and can be written"
        return
    refuse_another(run, info["identity"], identity(config, manifest.fingerprint))
    held = " and is held by a driver at the moment" if storage.exists(run.path(LOCK_NAME)) else ""
    yield f"run folder: {run.uri} holds this run ({info.get('status')}){held}; pretrain would continue it"


def _measure(config: Config, manifest: Manifest) -> Iterator[str | Rates]:
    """Read the first units of the run's order, and decode, augment and encode some of their images."""
    table = UnitTable(manifest)
    policy, limits = policy_of(config.views), limits_of(config.data)
    plan = Plan(table, config.run.seed)
    count = min(table.num_units, UNITS)
    (task,) = plan_tasks(manifest, plan, 0, count, count)
    before, started = storage.counters(), time.monotonic()
    tables = [read_planned(task, index) for index in range(count)]  # as the stream reads, lost units included
    read_s, after = time.monotonic() - started, storage.counters()
    units = [{name: one[name].to_numpy(zero_copy_only=False) for name in one.column_names} for one in tables]
    encoded = [data for unit in units for data in unit["image"].tolist()]
    images, requests = len(encoded), after.requests - before.requests
    yield (
        f"reading: {images} images in {count} units took {requests} requests, {read_s / count:.2f} s a unit one after "
        f"another, {(after.bytes - before.bytes) / _MIB / max(read_s, 1e-9):,.0f} MiB/s"
    )
    gone = [bool(place) for unit in units for place in unit["lost_id"] >= 0]
    headers = [read_header(data, limits) for data in encoded]
    yield _sizes(encoded, headers)
    refused = [header for header, lost in zip(headers, gone, strict=True) if isinstance(header, Rejected) and not lost]
    # One in so many is decoded, all are looked into: eight units are eight places of the data set.
    good = [data for data, header in zip(encoded, headers, strict=True) if not isinstance(header, Rejected)]
    some = good[:: max(1, len(good) // SAMPLES)]
    broken = [verdict for data in some if isinstance(verdict := decode(data, limits), Rejected)]
    bad, lost = broken + refused, sum(gone)
    yield (
        f"decoding: {len(some)} images decoded, {images} headers read, {len(bad)} refused{_reasons(bad)}"
        + (f"; {lost} images of shards that cannot be read" if lost else "")
    )
    _refuse_too_many(config, lost + len(refused), images, bad)
    _refuse_too_many(config, len(broken), len(some), bad)
    stage = ViewStage(policy, config.run.seed, limits, scaled_decode=config.views.scaled_decode)
    views_s, views = _views_cost(stage, units)
    yield (
        f"views: {how_views_are_made('cpu')}; {1 / views_s if views_s else 0:,.0f} images/s a core here, "
        f"shape {tuple(views.shape[1:])} uint8"
    )
    encoder_s, device = _encoder_cost(config, views[:_ENCODER_IMAGES])
    name = f"{config.model.encoder} {config.model.width}x"
    yield f"encoder: {name}, {1 / encoder_s:,.1f} images/s on this machine's {device}"
    yield Rates((after.bytes - before.bytes) / images, requests / images, views_s, encoder_s)


def _refuse_too_many(config: Config, bad: int, images: int, reasons: Sequence[Rejected]) -> None:
    """Stop where so many images cannot be used that chance does not explain it under the limit.

    Raises:
        DataError: three standard deviations above `data.max_rejected_fraction`.
    """
    limit = config.data.max_rejected_fraction
    if bad > images * limit + 3 * math.sqrt(images * limit * (1 - limit)) or bad == images:
        raise DataError(
            f"{bad} of {images} images cannot be used, and pretrain would stop", where=config.data.train,
            got=_reasons(reasons).lstrip(": ") or "shards that cannot be read",
            expected=f"at most {limit:.2%} (data.max_rejected_fraction)",
        )  # fmt: skip


def _sizes(encoded: Sequence[bytes | None], headers: Sequence[Header | Rejected]) -> str:
    """Sizes of the images, from their headers."""
    present = [data for data in encoded if data]
    read = [header for header in headers if isinstance(header, Header)]
    if not read:
        return "images: none has a header that can be read"
    areas = sorted(read, key=lambda header: header.height * header.width)
    small, middle, large = areas[0], areas[len(areas) // 2], areas[-1]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(header.kind for header in read).most_common())
    return (
        f"images: {kinds}; {small.width} x {small.height} to {large.width} x {large.height}, median {middle.width} x "
        f"{middle.height} and {median(map(len, present)) / 1000:.1f} kB"
    )


def _reasons(bad: Sequence[Rejected]) -> str:
    if not bad:
        return ""
    counts = Counter(one.reason for one in bad)
    details = {one.reason: one.detail for one in reversed(bad)}
    return ": " + "; ".join(f"{count} {reason} ({details[reason]})" for reason, count in counts.most_common())


def _views_cost(stage: ViewStage, units: Sequence[Columns]) -> tuple[float, np.ndarray]:
    """CPU seconds an image on one core, and the views; units of which no image can be used are passed over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made: list[np.ndarray] = []
        started = time.process_time()
        for unit in units:
            with contextlib.suppress(DataError):
                made.append(stage.columns(unit)["views"])
            if len(made) == 1:  # what is set up once is not an image's cost
                started = time.process_time()
                if unit is units[-1]:
                    made.append(stage.columns(unit)["views"])
        if not made:
            raise DataError(
                "no image of the first units can be decoded", fix="look at some of them with another program"
            )
        timed = sum(map(len, made[1:]))
        return (time.process_time() - started) / timed if timed else 0.0, np.concatenate(made)
    finally:
        torch.set_num_threads(threads)


def _encoder_cost(config: Config, views: np.ndarray) -> tuple[float, str]:
    """Seconds an image of forward and backward on this machine's device, and its name."""
    from simclr_ray.train.build import build_model  # here, for timm takes seconds that a bad config need not wait for

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = build_model(config).to(device).to(memory_format=torch.channels_last)
    autocast, on_device = autocast_of(config.train.precision, device), torch.from_numpy(views).to(device)

    def step() -> None:
        with autocast():
            out = model(encoder_input(on_device, policy_of(config.views), channels_last=True))
        out.float().square().mean().backward()
        if cuda:
            torch.cuda.synchronize()

    step()
    started = time.monotonic()
    step()
    seconds = (time.monotonic() - started) / len(views)
    return seconds, torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"


def _memory(config: Config, derived: Derived) -> Iterator[str]:
    """What the stream may hold, and where it would spill."""
    ahead = bytes_ahead(config, derived)
    shared = Path("/dev/shm")  # noqa: S108  where Ray's object store lives; nothing is written
    has = f"; /dev/shm has {shutil.disk_usage(shared).total / _GIB:.1f} GiB" if shared.is_dir() else ""
    size = policy_of(config.views).size
    share = -(-config.train.global_batch // (config.cluster.workers or 1))
    yield (
        f"memory: finished views that wait for the workers take up to {ahead / _MIB:,.0f} MiB of object store{has}; "
        f"one worker's share of a batch is {share * 6 * size * size / _MIB:,.0f} MiB of views"
    )


def expected(config: Config, derived: Derived, rates: Rates, *, cores: int) -> Iterator[str]:
    """What the whole run would take, by what was measured; pure arithmetic.

    Args:
        config: Of the run.
        derived: Its numbers.
        rates: Measured.
        cores: Of this machine.
    """
    images = derived.total_steps * config.train.global_batch
    yield (
        f"expected reads: {images:,} images, {images * rates.requests_an_image:,.0f} requests, "
        f"{images * rates.bytes_an_image / _GIB:,.1f} GiB over {derived.epoch_at(derived.total_steps):.1f} epochs"
    )
    views_h, encoder_h = images * rates.views_s / 3600, images * rates.encoder_s / 3600
    yield (
        f"expected work: {_span(views_h)} of a core for decoding and views, "
        f"{_span(encoder_h)} of such a device for the encoder"
    )
    workers = config.cluster.workers or 1
    free = max(config.cluster.data_cpus, cores - round(workers * config.cluster.cpus_per_worker))
    data_h, train_h = views_h / free, encoder_h / workers
    slower = ("decoding and views", f"add {data_h / train_h:.1f} times the CPUs") if data_h > train_h else (
        "the encoder", "the stream will keep up")  # fmt: skip
    yield (
        f"expected time: {_span(max(data_h, train_h))} with {workers} such device{'s' * (workers > 1)} and {free} "
        f"CPU{'s' * (free > 1)} for the stream; {slower[0]} decides, {slower[1]}"
    )


def _span(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"


def run_check(config: ConfigSource, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Say each finding of `check`, and that nothing stands against the run."""
    started = time.monotonic()
    for line in check(config, overrides):
        say(line)
    say(f"checked in {time.monotonic() - started:.1f} s; nothing stands against pretrain")
