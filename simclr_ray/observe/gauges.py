"""A sink that keeps gauges and a counter up to date, for whoever scrapes them (Prometheus, and Grafana from it).

It knows no Ray: what makes an instrument is passed in, so the same sink serves any exporter. Each metric of a record
becomes a gauge of its name; three more say which step, which attempt and of when the newest checkpoint is; a counter
adds up the images. Of the checkpoint the time of day is exported and not its age, for an age stands still when
training does, which is when it matters.
"""

from __future__ import annotations

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

    def __init__(self, gauge: MakeInstrument, counter: MakeInstrument, *, moments: bool = True) -> None:
        """Take what makes gauges and counters; each is called once a name.

        Args:
            gauge: Makes a gauge.
            counter: Makes a counter.
            moments: Export step, attempt, checkpoint and images too; only one process of a run does.
        """
        self._gauge, self._counter, self._moments = gauge, counter, moments
        self._made: dict[str, Move] = {}
        self._seen: int | None = None

    def log(self, record: Record) -> None:
        """Bring the instruments up to date."""
        for metric, value in record.values.items():
            if metric != CHECKPOINT_AGE:
                self._move(self._gauge, instrument_name(metric), METRICS[metric].help, value)
        if self._moments:
            self._log_moment(record)

    def close(self) -> None:
        """Nothing is buffered here."""

    def _log_moment(self, record: Record) -> None:
        if CHECKPOINT_AGE in record.values:
            self._move_own(self._gauge, CHECKPOINT_TIME, record.wall_s - record.values[CHECKPOINT_AGE])
        self._move_own(self._gauge, STEP, record.step)
        self._move_own(self._gauge, ATTEMPT, record.attempt)
        more = record.samples_seen - self._seen if self._seen is not None else 0
        if more > 0:  # less: an attempt went back to its checkpoint
            self._move_own(self._counter, IMAGES, more)
        self._seen = record.samples_seen

    def _move_own(self, make: MakeInstrument, name: str, value: float) -> None:
        self._move(make, name, HELP[name], value)

    def _move(self, make: MakeInstrument, name: str, description: str, value: float) -> None:
        if name not in self._made:
            self._made[name] = make(name, description)
        self._made[name](value)
