"""From a space to Ray Tune's own parts: who proposes values, who ends trials, and how many fit side by side."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.search.space import Distribution, SearchSpec

OBJECTIVE, SECOND, MODE = "score", "second_score", "max"
TIME = "training_iteration"
"""Scores of a trial so far."""
ScoresBefore = Callable[[str], Sequence[float]]
"""Objectives that the trial of a name had before a search was continued, oldest first."""
_limit = 0
"""Trials at a time, of this start."""


def domain(values: Distribution) -> Any:
    """What Tune samples a key from."""
    given = values.values
    match values.kind:
        case "uniform":
            return tune.uniform(*given)
        case "loguniform":
            return tune.loguniform(*given)
        case "quniform":
            return tune.quniform(*given)
        case "int":
            return tune.randint(given[0], given[1] + 1)
        case "logint":
            return tune.lograndint(given[0], given[1] + 1)
        case "choice":
            return tune.choice(list(given))
        case "grid":
            return tune.grid_search(list(given))


def domains(spec: SearchSpec) -> dict[str, Any]:
    """Tune's space."""
    return {key: domain(values) for key, values in spec.space.items()}


@contextlib.contextmanager
def limited(side_by_side: int) -> Iterator[None]:
    """Have `searcher` propose no more trials at a time than this start has room for.

    Tune keeps a searcher as it was when the search began, with the limit of then; a search that is continued on a
    smaller cluster would start trials that take each other's CPUs.
    """
    global _limit
    _limit = side_by_side
    try:
        yield
    finally:
        _limit = 0


class _Limited:
    """A limit that no stored state brings back."""

    @property
    def max_concurrent(self) -> int:
        """Trials at a time."""
        return _limit

    @max_concurrent.setter
    def max_concurrent(self, value: int) -> None:
        """Passed over."""


class Variants(_Limited, BasicVariantGenerator):  # type: ignore[misc]
    """Random values and grids."""


class Limiter(_Limited, ConcurrencyLimiter):  # type: ignore[misc]
    """A searcher that learns, asked for so many at a time."""


def searcher(spec: SearchSpec) -> Searcher | SearchAlgorithm:
    """Who proposes values, within `limited`; the same seed and the same results give the same proposals.

    Args:
        spec: Of the search.

    Raises:
        ConfigError: optuna is not installed.
    """
    if spec.searcher != "tpe":
        return Variants(random_state=spec.seed)
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "searcher tpe needs optuna, which is not installed", where="searcher",
            fix="pip install 'simclr-ray[search]', or use searcher random",
        ) from None  # fmt: skip
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    one, two = {"metric": OBJECTIVE, "mode": MODE}, {"metric": [OBJECTIVE, SECOND], "mode": [MODE, MODE]}
    return Limiter(OptunaSearch(seed=spec.seed, **(two if spec.objective.also else one)), max_concurrent=1)


class _Remembering:
    """Tells a scheduler, when its search is continued, what its trials had scored: Tune keeps nothing of a scheduler.

    Population-based training needs no telling, for it decides by the newest scores, which come again by themselves.
    """

    def __init__(self, before: ScoresBefore, **how: Any) -> None:
        super().__init__(**how)
        self._before = before

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """A trial begins, or is there again, ended ones too."""
        super().on_trial_add(controller, trial)  # type: ignore[misc]
        known = int((trial.last_result or {}).get(TIME, 0))  # later scores are reported again
        for time, value in enumerate(self._before(trial.trial_id)[:known] if known else (), 1):
            self.remember(trial, {TIME: time, OBJECTIVE: value})

    def remember(self, trial: Any, result: dict[str, Any]) -> None:
        """Take in an old score without deciding anything."""
        raise NotImplementedError


class Halving(_Remembering, AsyncHyperBandScheduler):  # type: ignore[misc]
    """Asynchronous successive halving."""

    def remember(self, trial: Any, result: dict[str, Any]) -> None:
        """Into the rungs; what would have been decided was."""
        self.on_trial_result(None, trial, result)


class Median(_Remembering, MedianStoppingRule):  # type: ignore[misc]
    """Ends what is below the others' median."""

    def remember(self, trial: Any, result: dict[str, Any]) -> None:
        """Into the means that others are compared with; a trial that is begun again is in them already."""
        if all(one[TIME] != result[TIME] for one in self._results[trial]):
            self._results[trial].append(result)


def scheduler(spec: SearchSpec, scores: int, before: ScoresBefore = lambda name: ()) -> TrialScheduler:
    """Who ends or changes trials.

    Each is told its objective here and none by Tune's own setting, which would overwrite the two of `searcher`.

    Args:
        spec: Of the search.
        scores: How many a whole trial has.
        before: What trials of a search that is continued have scored.
    """
    by = {"time_attr": TIME, "metric": OBJECTIVE, "mode": MODE}
    match spec.scheduler:
        case "asha":
            return Halving(
                before, **by, max_t=max(scores, spec.grace), grace_period=spec.grace, reduction_factor=spec.reduction,
                stop_last_trials=False,  # a trial ends by itself; one of another batch may have a score more
            )  # fmt: skip
        case "median":
            return Median(before, **by, grace_period=spec.grace, min_samples_required=2)
        case "pbt":
            # Tune draws who goes on from whom from the global generators.
            random.seed(spec.seed)
            np.random.seed(spec.seed)
            return PopulationBasedTraining(
                **by,
                perturbation_interval=spec.perturb_every,
                burn_in_period=spec.grace,
                quantile_fraction=spec.quantile,
                hyperparam_mutations={key: _mutations(values) for key, values in spec.space.items()},
                custom_explore_fn=Inside(dict(spec.space)),
                log_config=False,
            )
        case "none":
            return FIFOScheduler()


class Inside:
    """Brings values that PBT multiplied back into the space."""

    def __init__(self, space: Mapping[str, Distribution]) -> None:
        self._space = space

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """The nearest configuration inside."""
        return config | {key: values.clamped(config[key]) for key, values in self._space.items()}


def _mutations(values: Distribution) -> Any:
    return list(values.values) if values.kind in ("choice", "grid") else domain(values)


def side_by_side(
    spec: SearchSpec, cluster: ClusterConfig, resources: Mapping[str, float], *, may_grow: bool
) -> tuple[int, str]:
    """How many trials run at a time, and why.

    Tune counts trials, not what their workers take; more of them than there is room for would take the CPU that the
    streams need, and all would wait for ever. A cluster that may grow is taken at the user's word, as it is for
    `cluster.workers`: Ray does not say what an autoscaler may add, and placement groups of trials ask for it.

    Args:
        spec: Of the search.
        cluster: Of a trial.
        resources: Of the cluster.
        may_grow: Whether somebody else started it, so that it may have an autoscaler.

    Raises:
        ClusterError: not even one fits.
    """
    gpus = resources.get("GPU", 0.0)
    use_gpu = cluster.use_gpu if cluster.use_gpu is not None else gpus > 0
    workers = cluster.workers or (max(1, int(gpus)) if use_gpu else 1)
    by_cpu = math.floor((resources.get("CPU", 0.0) - cluster.data_cpus) / (workers * cluster.cpus_per_worker) + 1e-9)
    fitting = max(0, min(by_cpu, int(gpus // workers)) if use_gpu else by_cpu)
    has = f"{resources.get('CPU', 0.0):g} CPUs" + (f" and {gpus:g} GPUs" if use_gpu else "")
    each = f"{workers} worker{'s' * (workers > 1)} of {cluster.cpus_per_worker:g} CPU{' and a GPU' * use_gpu}"
    why = f"{each} a trial; the cluster has {has}"
    if may_grow and cluster.workers and spec.max_concurrent and spec.max_concurrent > fitting:
        return min(spec.max_concurrent, spec.num_trials), (
            f"as max_concurrent says; {why}, room for {fitting}: the others wait for nodes that an autoscaler adds"
        )
    if fitting < 1:
        raise ClusterError(
            "no trial fits the cluster", where="cluster.workers", got=has,
            expected=f"{each}, and {cluster.data_cpus} CPU for the streams",
            fix="use fewer workers, or add nodes; where an autoscaler adds them, set cluster.workers, and "
            "max_concurrent in the space",
        )  # fmt: skip
    if spec.max_concurrent and spec.max_concurrent > fitting:
        why += f", which have no room for max_concurrent={spec.max_concurrent}"
    return min(spec.max_concurrent or fitting, fitting, spec.num_trials), why
