"""What `check` measures of a run, on the machine or node that it is called on: reading, views, encoder and loss."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.data.decode import Rejected, decode, read_header
from simclr_ray.data.header import Header
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Plan, UnitTable
from simclr_ray.data.units import plan_tasks, read_task
from simclr_ray.errors import DataError
from simclr_ray.learn.nt_xent import nt_xent
from simclr_ray.train.cost import StepRates, StreamRates
from simclr_ray.train.derive import limits_of, policy_of
from simclr_ray.train.step import autocast_of, encoder_input
from simclr_ray.views.make import how_views_are_made
from simclr_ray.views.stage import Columns, ViewStage

SAMPLES = 64
"""Images that are decoded."""
UNITS = 8
"""Units that are read: as many places of the data set."""
_ENCODER_IMAGES = 8
_LOSS_IMAGES, _LOSS_S = 1024, 0.05
_MIB = 1 << 20


@dataclass(frozen=True)
class Stream:
    """What was found on the way from the store to the views."""

    said: tuple[str, ...]
    """A sentence each."""
    rates: StreamRates
    views: np.ndarray
    """Of some images, (n, 2, S, S, 3) uint8, for the encoder."""


@dataclass(frozen=True)
class Step:
    """What was found of an optimizer step."""

    said: tuple[str, ...]
    rates: StepRates


def measure_stream(config: Config, manifest: Manifest) -> Stream:
    """Read the first units of the run's order, decode some of their images and make views of all, on one core.

    Raises:
        DataError: more images than the limit cannot be used.
        StorageError: the store refuses or does not answer.
    """
    said: list[str] = []
    table = UnitTable(manifest)
    policy, limits = policy_of(config.views), limits_of(config.data)
    plan = Plan(table, config.run.seed)
    count = min(table.num_units, UNITS)
    (task,) = plan_tasks(manifest, plan, 0, count, count)
    before, started = storage.counters(), time.monotonic()
    tables = list(read_task(task))  # as the stream reads, ahead and with lost units
    read_s, after = time.monotonic() - started, storage.counters()
    units = [{name: one[name].to_numpy(zero_copy_only=False) for name in one.column_names} for one in tables]
    encoded = [data for unit in units for data in unit["image"].tolist()]
    images, requests = len(encoded), after.requests - before.requests
    said.append(
        f"reading: {images} images in {count} units took {requests} requests, {read_s / count:.2f} s a unit by one "
        f"reader, who reads ahead, {(after.bytes - before.bytes) / _MIB / max(read_s, 1e-9):,.0f} MiB/s"
    )
    gone = [bool(place) for unit in units for place in unit["lost_id"] >= 0]
    headers = [read_header(data, limits) for data in encoded]
    said.append(_sizes(encoded, headers))
    refused = [header for header, lost in zip(headers, gone, strict=True) if isinstance(header, Rejected) and not lost]
    # One in so many is decoded, all are looked into: eight units are eight places of the data set.
    good = [data for data, header in zip(encoded, headers, strict=True) if not isinstance(header, Rejected)]
    some = good[:: max(1, len(good) // SAMPLES)]
    broken = [verdict for data in some if isinstance(verdict := decode(data, limits), Rejected)]
    bad, lost = broken + refused, sum(gone)
    said.append(
        f"decoding: {len(some)} images decoded, {images} headers read, {len(bad)} refused{_reasons(bad)}"
        + (f"; {lost} images of shards that cannot be read" if lost else "")
    )
    _refuse_too_many(config, lost + len(refused), images, bad)
    _refuse_too_many(config, len(broken), len(some), bad)
    stage = ViewStage(policy, config.run.seed, limits, scaled_decode=config.views.scaled_decode)
    views_s, views = _views_cost(stage, units)
    said.append(
        f"views: {how_views_are_made('cpu')}; {1 / views_s if views_s else 0:,.0f} images/s a core, "
        f"shape {tuple(views.shape[1:])} uint8"
    )
    read = after.bytes - before.bytes
    rates = StreamRates(read / images, requests / images, read / max(read_s, 1e-9), views_s)
    return Stream(tuple(said), rates, views[:_ENCODER_IMAGES])


def measure_step(config: Config, views: np.ndarray) -> Step:
    """Forward and backward of the encoder on some views (n, 2, S, S, 3), and of the loss on random projections."""
    encoder_s, device = _encoder_cost(config, views)
    loss_s = _loss_cost(config)
    said = (
        f"encoder: {config.model.encoder} {config.model.width}x, {1 / encoder_s:,.1f} images/s on one {device}",
        f"loss: of a step of {config.train.global_batch:,} images {loss_s:.3f} s on one such device, shared by all",
    )
    return Step(said, StepRates(encoder_s, loss_s / config.train.global_batch))


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
    """Seconds an image of forward and backward on this process's device, and its name."""
    from simclr_ray.train.build import build_model  # here, for timm takes seconds that a bad config need not wait for

    device = _device()
    cuda = device.type == "cuda"
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


def _loss_cost(config: Config) -> float:
    """Seconds of value and gradient over a whole step's pairs; from fewer images, for it grows with their square."""
    batch = config.train.global_batch
    images, seconds = min(batch, _LOSS_IMAGES), 0.0
    while True:
        seconds = _loss_of(images, config)
        if images == batch or seconds > _LOSS_S:
            return seconds * (batch / images) ** 2
        images = min(batch, 2 * images)  # on a fast device a small one is mostly the way to it


def _loss_of(images: int, config: Config) -> float:
    """Seconds of one value and gradient."""
    a, b = (torch.randn(images, config.model.projection_dim, device=_device(), requires_grad=True) for _ in range(2))
    times = []
    for _ in range(3):
        started = time.monotonic()
        nt_xent(a, b, config.loss.temperature).backward()  # type: ignore[no-untyped-call]
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
    return median(times)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
