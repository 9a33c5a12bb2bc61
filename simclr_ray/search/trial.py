"""A trial: one of our own trainings, watched from outside, and a score for each checkpoint that is due.

The training is `pretrain`, in a thread of the trial's process, with a run folder of its own; it knows nothing of the
search. The trial asks Ray for no CPU: what it would hold, its own workers would wait for. It is ended as Ctrl-C ends a
run, so that Ray Train gives its placement group back; a trial that is killed leaves that to Ray Train's cleaner, which
needs the State API. Tune's checkpoints are pointers to ours, a run folder and a step.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.data.manifest import read_manifest
from simclr_ray.errors import ClusterError, ConfigError, DataError, HeldError, NumericsError, root_cause
from simclr_ray.search.objective import better_is_more, score_checkpoint
from simclr_ray.search.propose import OBJECTIVE, SECOND
from simclr_ray.search.record import Generation, Place, Score, TrialRecord, read_record
from simclr_ray.search.room import give_back, wait_for_a_place
from simclr_ray.search.space import ObjectiveSpec, Settings, with_settings
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.derive import derive
from simclr_ray.train.pretrain import Origin, pretrain
from simclr_ray.train.run import RunFolder

POINTER = "pointer.json"
MEMORY_BYTES = 1 << 20
"""A trial asks for this and nothing else, for Tune wants to place something."""
ALL = 1_000_000
"""Checkpoints that the training keeps: none may go before it is measured; the trial deletes those that were."""
LOOK_S, LOOK_FAR_S = 0.5, 3.0
"""Between two looks for a checkpoint: in a local folder, and in a store where looking is a request."""
STOP_S, HUNG_S = 120.0, 5.0
"""Longest wait for a training that was asked to stop: for a step and a save, and where it no longer makes steps."""


class StalledError(ClusterError):
    """A trial that no longer gets anywhere; it had its time, and is not begun again."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search share."""

    folder: str
    """Where trials have their folders."""
    config: Config
    """The given configuration; its `cluster.address` says whether the cluster may grow."""
    objective: ObjectiveSpec
    measure: str
    stall_s: float
    keep: int
    """Newest measured checkpoints of a trial to keep: others may go on from one that is no longer the newest."""
    probe: Any
    """Reference to the `ProbeSet`."""
    room: Any = None
    """Where a trial takes its place before it trains, see `search.room`; None: it needs none."""
    cases: Sequence[tuple[str, Settings]] = ()
    """Name and values of each trial by number; empty where Tune proposes the values."""


@dataclass(frozen=True)
class Rungs:
    """Steps at which a trial is due to be scored, counted in images, so that trials of other batches compare."""

    every: int
    total_steps: int

    @classmethod
    def of(cls, config: Config, trial: Config, every: int, total_steps: int) -> Rungs:
        """Of a trial whose batch may differ from the given configuration's."""
        return cls(max(1, round(every * config.train.global_batch / trial.train.global_batch)), total_steps)

    @property
    def steps(self) -> list[int]:
        """Ascending; the last step is always one."""
        return [*range(self.every, self.total_steps, self.every), self.total_steps]

    def due_after(self, step: int) -> int | None:
        """The next one; None at the end."""
        return next((one for one in self.steps if one > step), None)


class Training:
    """`pretrain` in a thread."""

    def __init__(self, config: Config, origin: Origin | None) -> None:
        self._config, self._origin = config, origin
        self._stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._thread.start()

    def again(self) -> Training:
        """The same once more; it continues where its run folder stands."""
        return Training(self._config, self._origin)

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> bool:
        """Ask it to save and end, and wait.

        Returns:
            Whether it has ended.
        """
        self._stop.set()
        self._thread.join(timeout_s)
        return not self.running

    def wait(self, timeout_s: float) -> None:
        """Sleep, but no longer than it runs."""
        self._thread.join(timeout_s)

    def _train(self) -> None:
        try:
            pretrain(self._config, origin=self._origin, stop=self._stop)
        except KeyboardInterrupt as error:
            self.error = None if self._stop.is_set() else error
        except BaseException as error:  # handed to the trial's thread
            self.error = error


class Trial(tune.Trainable):  # type: ignore[misc]
    """See the module."""

    def setup(self, config: dict[str, Any], plan: TrialPlan) -> None:
        """Find out who this is; nothing starts before Tune has said where to go on from."""
        self._plan = plan
        if plan.cases:
            name, settings = plan.cases[config["case"]]
        else:
            name, settings = self.trial_id, config
        self._settings = dict(settings)
        self._folder = storage.join(plan.folder, name)
        self._record = read_record(self._folder) or TrialRecord(name)
        self._pointer: Place | None = None
        self._training: Training | None = None
        self._began = time.monotonic()
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(plan.config.cluster.start_timeout_s)
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"

    def step(self) -> dict[str, Any]:
        """Wait for the next checkpoint that is due, and measure it."""
        try:
            if self._training is None:
                self._begin()
            score = self._next_score()
        except NumericsError as error:
            return self._end(f"diverged: {error.what}")
        except (ConfigError, DataError, StalledError) as error:  # every retry would meet it again
            return self._end(str(error))
        self._pointer = Place(self._run.uri, score.step)
        last = self._rungs.due_after(score.step) is None
        if last:
            self._finish("finished", "")
        return {**self._objectives(score.measures), "step": score.step, "done": last, **score.measures}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Leave where the newest scored checkpoint is."""
        pointer = {"run": self._pointer.run, "step": self._pointer.step} if self._pointer else None
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from there: this trial's own, or in population-based training another's."""
        pointer = json.loads((Path(checkpoint_dir) / POINTER).read_text())
        self._pointer = Place(**pointer) if pointer else None

    def cleanup(self) -> None:
        """End the training, so that its workers and their placement group are gone before this process is."""
        if self._training is None:
            give_back(self._plan.room, self._record.name)
            return
        if self._record.status == "finished":
            self._training.wait(STOP_S)  # it is about to end by itself, and its run folder should say so
        self._training.stop(HUNG_S if self._record.status == "failed" else STOP_S)
        give_back(self._plan.room, self._record.name)

    def _begin(self) -> None:
        wait_for_a_place(self._plan.room, self._record.name)
        mine = self._record.life(self._folder, self._settings, self._pointer)
        self._record.status, self._record.why = "running", ""
        self._record.write(self._folder)
        config = self._config_of(mine)
        self._run = RunFolder(storage.normalise(mine.run))
        if self._pointer is not None and self._pointer.run != self._run.uri:
            # A life that began from another's checkpoint has scored nothing yet, or it was lost: it goes on from there.
            self._pointer = Place(self._run.uri, mine.origin.step if mine.origin else 0)
        self._attempts_before = self._attempts()
        origin = Origin(mine.origin.run, mine.origin.step) if mine.origin else None
        self._training = Training(config, origin)

    def _config_of(self, generation: Generation) -> Config:
        plan = self._plan
        trial = with_settings(plan.config, generation.settings)
        total = derive(trial, read_manifest(storage.normalise(str(trial.data.train)))).total_steps
        self._rungs = Rungs.of(plan.config, trial, plan.objective.every, total)
        self._batch = trial.train.global_batch
        return with_settings(
            trial,
            {
                "run.folder": generation.run,
                "train.checkpoint_every": self._rungs.every,
                "train.keep_checkpoints": ALL,
            },
        )

    def _next_score(self) -> Score:
        due = self._rungs.due_after(self._pointer.step if self._pointer else 0)
        assert due is not None, "a finished trial takes no further step"
        generation = len(self._record.generations)
        known = [one for one in self._record.scores if one.generation == generation and one.step >= due]
        if known:  # from before a restart
            return min(known, key=lambda one: one.step)
        step = self._wait_for(due)
        found = self._measured(step)
        score = Score(step, generation, step * self._batch, found, round(time.monotonic() - self._began, 1))
        self._record.scores.append(score)
        self._record.write(self._folder)
        self._trim()
        return score

    def _wait_for(self, due: int) -> int:
        """The first committed step from `due` on; a save may have been passed over because the one before was slow."""
        assert self._training is not None
        since = time.monotonic()
        while True:
            running = self._training.running
            steps = [step for step in ckpt.committed_steps(self._run.checkpoints) if step >= due]
            if steps:
                return steps[0]
            held = not running and isinstance(self._training.error, HeldError)
            if not held and self._attempts() == self._attempts_before:
                since = time.monotonic()  # it waits for nodes, which has its own limit (cluster.start_timeout_s)
            if held:
                # By this trial's life on a host that was lost, which can no longer say so; its lock falls by its age.
                time.sleep(LOOK_FAR_S)
                self._training = self._training.again()
            elif not running:
                raise self._training.error or ClusterError(
                    "the training ended without a checkpoint", where=self._run.uri, expected=f"one of step {due}"
                )
            if time.monotonic() - since > self._plan.stall_s:
                raise StalledError(
                    f"no checkpoint of step {due} came for {self._plan.stall_s:g} s", where=self._run.uri,
                    fix="a search with a larger stall_s waits longer, where steps take so long",
                )  # fmt: skip
            self._training.wait(LOOK_S if storage.is_local(self._run.uri) else LOOK_FAR_S)

    def _attempts(self) -> int:
        """Times that workers have begun on this life."""
        return int((self._run.info() or {}).get("attempts") or 0)

    def _measured(self, step: int) -> Mapping[str, float]:
        spec = self._plan.objective
        task = ray.remote(score_checkpoint).options(
            num_cpus=spec.cpus, num_gpus=spec.gpus, max_retries=3,
            scheduling_strategy="SPREAD",  # anything but the placement group of this trial, which has no CPU
        )  # fmt: skip
        arguments = (self._run.uri, step, self._plan.probe, self._plan.config.evaluate, spec.cpus, spec.gpus)
        try:
            return dict(ray.get(task.remote(*arguments), timeout=self._plan.stall_s))
        except ray.exceptions.GetTimeoutError:
            raise StalledError(
                f"step {step} was not measured within {self._plan.stall_s:g} s", where=self._run.uri,
                fix="a search with a larger stall_s waits longer; or ask for fewer images or less in objective.cpus",
            ) from None  # fmt: skip
        except ray.exceptions.RayTaskError as error:
            raise root_cause(error) or error from None

    def _trim(self) -> None:
        """Delete checkpoints before the newest that were measured."""
        scored = sorted(one.step for one in self._record.scores if one.generation == len(self._record.generations))
        if len(scored) > self._plan.keep:
            committed = ckpt.committed_steps(self._run.checkpoints)
            ckpt.forget(self._run.checkpoints, [step for step in committed if step < scored[-self._plan.keep]])

    def _end(self, why: str) -> dict[str, Any]:
        """A trial that no retry would mend, as the worst of all."""
        self._finish("failed", why)
        return {**self._objectives({}), "done": True}

    def _objectives(self, found: Mapping[str, float]) -> dict[str, float]:
        """What searcher and scheduler go by; more is better."""
        also = self._plan.objective.also
        second = {SECOND: better_is_more(also, found.get(also))} if also else {}
        return {OBJECTIVE: better_is_more(self._plan.measure, found.get(self._plan.measure))} | second

    def _finish(self, status: Any, why: str) -> None:
        self._record.status, self._record.why = status, why
        self._record.write(self._folder)
