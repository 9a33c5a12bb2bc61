"""A sink that keeps gauges and a counter up to date, for whoever scrapes them (Prometheus, and Grafana from it).

It knows no Ray: what makes an instrument is passed in, so the same sink serves any exporter. Each metric of a record
becomes a gauge of its name; three more say which step, which attempt and of when the newest checkpoint is; a counter
adds up the images. Of the checkpoint the time of day is exported and not its age, for an age stands still when
training does, which is when it matters.

Exporters forget: Ray 2.60 leaves a gauge out that was not set within two of its reports (20 s), and an alert about a
run that stands still would find nothing to look at. So whoever owns a sink calls `again` every now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from simclr_ray.observe.metrics import METRICS, Record

Move = Callable[[float], object]
"""Set a gauge, or add to a counter."""
MakeInstrument = Callable[[str, str], Move]
"""Of (name, description)."""

PREFIX = "simclr_"
CHECKPOINT_AGE = "time/checkpoint_age_s"
STEP, ATTEMPT, CHECKPOINT_TIME = f"{PREFIX}step", f"{PREFIX}attempt", f"{PREFIX}checkpoint_unix_s"
IMAGES = f"{PREFIX}images_total"
FADE_S = 120.0
"""For so long, or twice the time between two records, a record's values are shown as today's."""
HELP = {
    STEP: "optimizer steps done",
    ATTEMPT: "lives of the worker group since the start of the run",
    CHECKPOINT_TIME: "Unix time of the newest checkpoint, in seconds; before the first, of the attempt's start",
    IMAGES: "images consumed by all ranks since this driver started",
}


def instrument_name(metric: str) -> str:
    """Name of a metric's gauge: `train/loss` is `simclr_train_loss`."""
    return PREFIX + metric.replace("/", "_")


def instrument_names() -> set[str]:
    """Every name that may be exported."""
    return {instrument_name(metric) for metric in METRICS} - {instrument_name(CHECKPOINT_AGE)} | set(HELP)


class GaugeSink:
    """See the module. Instruments are made when they are first needed, so an exporter that fails fails as a sink."""

    def __init__(
        self, gauge: MakeInstrument, counter: MakeInstrument, *, moments: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Take what makes gauges and counters; each is called once a name.

        Args:
            gauge: Makes a gauge.
            counter: Makes a counter.
            moments: Export step, attempt, checkpoint and images too; only one process of a run does. Without them,
                values are those of a checkpoint and do not fade.
            clock: Seconds.
        """
        self._gauge, self._counter, self._moments, self._clock = gauge, counter, moments, clock
        self._made: dict[str, Move] = {}
        self._values: dict[str, float] = {}
        self._own: dict[str, float] = {}
        self._seen: int | None = None
        self._logged = clock()
        self._shown_until = 0.0

    def log(self, record: Record) -> None:
        """Bring the instruments up to date."""
        now = self._clock()
        self._shown_until = now + max(FADE_S, 2 * (now - self._logged))
        self._logged = now
        self._values = {}
        for metric, value in record.values.items():
            if metric != CHECKPOINT_AGE:
                name = instrument_name(metric)
                self._values[name] = value
                self._move(self._gauge, name, METRICS[metric].help, value)
        if self._moments:
            self._log_moment(record)

    def again(self) -> None:
        """Say what is known once more; see the module. A record's values are left out when they are old."""
        old = self._moments and self._clock() > self._shown_until
        for name, value in (self._own if old else self._own | self._values).items():
            self._made[name](value)

    def close(self) -> None:
        """Nothing is buffered here."""

    def _log_moment(self, record: Record) -> None:
        self._own |= {STEP: record.step, ATTEMPT: record.attempt}
        if CHECKPOINT_AGE in record.values:
            self._own[CHECKPOINT_TIME] = record.wall_s - record.values[CHECKPOINT_AGE]
        for name, value in self._own.items():
            self._move(self._gauge, name, HELP[name], value)
        more = record.samples_seen - self._seen if self._seen is not None else 0
        if more > 0:  # less: an attempt went back to its checkpoint
            self._move(self._counter, IMAGES, HELP[IMAGES], more)
        self._seen = record.samples_seen

    def _move(self, make: MakeInstrument, name: str, description: str, value: float) -> None:
        if name not in self._made:
            self._made[name] = make(name, description)
        self._made[name](value)
