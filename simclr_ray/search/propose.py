"""From a space to Ray Tune's own parts: who proposes values, who ends trials, and how many fit side by side."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
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
from ray.tune.search import SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.search.space import Distribution, SearchSpec

OBJECTIVE, SECOND, MODE = "score", "second_score", "max"
TIME = "training_iteration"
"""Scores of a trial so far."""


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


def searcher(spec: SearchSpec, side_by_side: int = 0) -> Searcher | SearchAlgorithm:
    """Who proposes values; the same seed and the same results give the same proposals.

    Args:
        spec: Of the search.
        side_by_side: Trials at a time: Tune hands its own setting on to Optuna, but not to its own generator.

    Raises:
        ConfigError: optuna is not installed.
    """
    if spec.searcher != "tpe":
        return BasicVariantGenerator(random_state=spec.seed, max_concurrent=side_by_side)
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "searcher tpe needs optuna, which is not installed", where="searcher",
            fix="pip install 'simclr-ray[search]', or use searcher random",
        ) from None  # fmt: skip
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if spec.objective.also is None:
        return OptunaSearch(seed=spec.seed, metric=OBJECTIVE, mode=MODE)
    return OptunaSearch(seed=spec.seed, metric=[OBJECTIVE, SECOND], mode=[MODE, MODE])


def scheduler(spec: SearchSpec, scores: int) -> TrialScheduler:
    """Who ends or changes trials; `scores` is how many a whole trial has.

    Each is told its objective here and none by Tune's own setting, which would overwrite the two of `searcher`.
    """
    by = {"time_attr": TIME, "metric": OBJECTIVE, "mode": MODE}
    match spec.scheduler:
        case "asha":
            return AsyncHyperBandScheduler(
                **by, max_t=max(scores, spec.grace), grace_period=spec.grace, reduction_factor=spec.reduction
            )
        case "median":
            return MedianStoppingRule(**by, grace_period=spec.grace, min_samples_required=2)
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
