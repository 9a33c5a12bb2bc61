"""What a run would take, by what was measured of its parts; pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simclr_ray.config import Config
from simclr_ray.train.derive import Derived

_GIB = 1 << 30


@dataclass(frozen=True)
class StreamRates:
    """Of the way from the store to the views, an image each."""

    bytes_an_image: float
    requests_an_image: float
    read_bytes_s: float
    """Bytes a second of one reader, a CPU of the stream's, who reads ahead."""
    views_s: float
    """CPU seconds of one core for the two views of an image, decoding included."""


@dataclass(frozen=True)
class StepRates:
    """Of an optimizer step, an image each."""

    encoder_s: float
    """Seconds of one device for forward and backward of an image's two views."""
    loss_s: float
    """Seconds of one device for an image's share of the loss of a global batch."""


@dataclass(frozen=True)
class Rates:
    """Both, and who would work."""

    stream: StreamRates
    step: StepRates
    workers: int
    """That train, a device each."""
    cpus: float
    """For the stream."""


def expected(config: Config, derived: Derived, rates: Rates) -> Iterator[str]:
    """Sentences on reads, work and time of the whole run, and on what decides the time.

    Args:
        config: Of the run.
        derived: Its numbers.
        rates: Measured.
    """
    stream, step, workers, cpus = rates.stream, rates.step, rates.workers, rates.cpus
    images = derived.total_steps * config.train.global_batch
    yield (
        f"expected reads: {images:,} images, {images * stream.requests_an_image:,.0f} requests, "
        f"{images * stream.bytes_an_image / _GIB:,.1f} GiB over {derived.epoch_at(derived.total_steps):.1f} epochs"
    )
    views_h, encoder_h, loss_h = (images * seconds / 3600 for seconds in (stream.views_s, step.encoder_s, step.loss_s))
    yield (
        f"expected work: {_span(views_h)} of a core for decoding and views, {_span(encoder_h)} of such a device for "
        f"the encoder, {_span(loss_h)} for the loss"
    )
    readers_h = images * stream.bytes_an_image / stream.read_bytes_s / 3600
    data = {"reading from the store": readers_h / cpus, "decoding and views": views_h / cpus}
    train_h = (encoder_h + loss_h) / workers
    name, slowest_h = max(data.items(), key=lambda one: one[1])
    if slowest_h > train_h:
        what = f"{name} decides, add {slowest_h / train_h:.1f} times the CPUs"
    elif loss_h > encoder_h:
        what = "the loss decides, which grows with the square of the batch; use more workers or a smaller one"
    else:
        what = "the encoder decides, the stream will keep up"
    several = "; what workers send each other is not in it" if workers > 1 else ""
    yield (
        f"expected time: {_span(max(slowest_h, train_h))} with {workers} such device{'s' * (workers > 1)} and "
        f"{cpus:g} CPU{'s' * (cpus > 1)} for the stream; {what}{several}"
    )


def _span(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"
