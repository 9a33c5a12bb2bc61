"""What Ray Tune tells of its trials while they run, as a few calm lines, and how they ended, into their records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ray import tune

from simclr_ray import storage
from simclr_ray.errors import root_cause
from simclr_ray.search.objective import WORST
from simclr_ray.search.propose import OBJECTIVE
from simclr_ray.search.record import TrialRecord, read_record, read_records
from simclr_ray.search.results import named, shown
from simclr_ray.search.room import give_back

_listeners: list[Progress] = []


class Told(tune.Callback):  # type: ignore[misc]
    """Passes on to whoever listens; Tune stores it with its own state, so it holds nothing."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A score came in."""
        for one in _listeners:
            one.scored(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial ended, or was ended."""
        for one in _listeners:
            one.ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial failed for good."""
        for one in _listeners:
            one.failed(trial)


class Progress:
    """Says a line for each new best and each end."""

    def __init__(
        self, say: Callable[[str], None], folder: str, measure: str, trials: int, names: Sequence[str], room: Any = None
    ) -> None:
        """Prepare; `names` of trials by their case number, empty where a trial's id is its name."""
        self._room = room
        self._say, self._folder, self._measure, self._trials, self._names = say, folder, measure, trials, names
        before = read_records(folder)
        self._done = {one.name for one in before if one.status != "running"}
        self._best = max((one.objective(measure) for one in before), default=WORST)

    def scored(self, trial: Any, result: dict[str, Any]) -> None:
        """Say it where it is the best so far."""
        value = result.get(OBJECTIVE, WORST)
        if value > self._best:
            self._best = value
            measured = shown(result.get(self._measure))
            self._say(
                f"best so far: {named(self._measure)} {measured}, trial {self._name(trial)} at step {result['step']}"
            )

    def ended(self, trial: Any) -> None:
        """Note an early end."""
        record = self._record(trial)
        if record.status == "running":
            record.status, record.why = "stopped early", "by the scheduler"
            record.write(self._folder_of(trial))
        self._count(trial, record)

    def failed(self, trial: Any) -> None:
        """Note why."""
        record, error = self._record(trial), trial.get_pickled_error() or trial.get_error()
        cause = root_cause(error)
        lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
        record.status = "failed"
        record.why = str(cause) if cause else (lines[-1] if lines else type(error).__name__)
        record.write(self._folder_of(trial))
        self._count(trial, record)

    def settle(self) -> None:
        """At the end: a trial that still counts as running was ended without a word."""
        for name in storage.list_names(self._folder):
            folder = storage.join(self._folder, name)
            record = read_record(folder)
            if record is not None and record.status == "running":
                record.status, record.why = "stopped early", "by the scheduler"
                record.write(folder)

    def _count(self, trial: Any, record: TrialRecord) -> None:
        give_back(self._room, record.name)  # its process may have been lost
        self._done.add(record.name)  # one that failed may be tried again by a continued search
        last = record.scores[-1] if record.scores else None
        where = (
            f" at step {last.step}: {named(self._measure)} {shown(last.measures.get(self._measure))}" if last else ""
        )
        why = f" ({' '.join(record.why.split())[:200]})" if record.status == "failed" else ""
        self._say(f"[{len(self._done)}/{self._trials}] trial {self._name(trial)} {record.status}{where}{why}")

    def _name(self, trial: Any) -> str:
        return self._names[trial.config["case"]] if self._names else str(trial.trial_id)

    def _folder_of(self, trial: Any) -> str:
        return storage.join(self._folder, self._name(trial))

    def _record(self, trial: Any) -> TrialRecord:
        return read_record(self._folder_of(trial)) or TrialRecord(self._name(trial))


@contextlib.contextmanager
def listening(progress: Progress) -> Iterator[None]:
    """Have `progress` told while Tune runs in this process."""
    _listeners.append(progress)
    try:
        yield
    finally:
        _listeners.remove(progress)
