"""Which nodes train and which make views: the two planes of a cluster, as labels of its nodes tell them apart.

Without labels both planes are the whole cluster, and only counting keeps a CPU free for the stream. With them, decoding
and views stay off the GPU nodes' CPUs, and an autoscaler adds nodes of the kind that is missing; of the stream's where
their label is `ray-subcluster`, by which Ray Data 2.60 sorts the cluster's CPUs into its own and others'.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Planes:
    """Resources of a cluster's nodes: those that may train, those that may make views, and all of either kind."""

    train: Resources
    data: Resources
    either: Resources

    def cpus_left(self, workers_cpus: float) -> float:
        """CPUs for the stream when the workers have theirs; workers take shared nodes' CPUs last."""
        either, train, data = (plane.get("CPU", 0.0) for plane in (self.either, self.train, self.data))
        shared = train + data - either
        return data - max(0.0, workers_cpus - (train - shared))


def whole(resources: Resources) -> Planes:
    """Both planes everywhere."""
    return Planes(resources, resources, resources)


def planes_of(config: ClusterConfig, nodes: Iterable[Mapping[str, Any]]) -> Planes:
    """The planes of a cluster.

    Args:
        config: With the labels asked for.
        nodes: As `ray.nodes()` gives them; those that are not alive do not count.
    """
    train: Counter[str] = Counter()
    data: Counter[str] = Counter()
    either: Counter[str] = Counter()
    for node in nodes:
        labels, resources = node.get("Labels") or {}, node.get("Resources") or {}
        trains, makes = matches(config.train_labels or {}, labels), matches(config.data_labels or {}, labels)
        for wanted, plane in ((trains, train), (makes, data), (trains or makes, either)):
            if wanted and node["Alive"]:
                plane.update(resources)
    return Planes(train, data, either)


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node's labels are those asked for, by the rules of Ray's label selectors."""
    return all(_holds(condition, labels.get(key)) for key, condition in selector.items())


def _holds(condition: str, value: str | None) -> bool:
    wanted = condition.removeprefix("!")
    among = re.fullmatch(r"in\((.*)\)", wanted)
    found = value in [one.strip() for one in among[1].split(",")] if among else value == wanted
    return found != condition.startswith("!")


def refuse_empty_planes(config: ClusterConfig, planes: Planes) -> None:
    """Refuse labels that no node of a cluster has; where an autoscaler may add one, this is not for asking.

    Raises:
        ClusterError: no node may train, or none may make views.
    """
    for key, labels, plane in (
        ("cluster.train_labels", config.train_labels, planes.train),
        ("cluster.data_labels", config.data_labels, planes.data),
    ):
        if labels and not plane.get("CPU"):
            raise ClusterError(
                "no node of the cluster has these labels", where=key, got=str(dict(labels)),
                fix="start nodes with `ray start --labels=KEY=VALUE`, or change the setting; where an autoscaler adds "
                "nodes, set cluster.workers",
            )  # fmt: skip


def workers_that_fit(config: ClusterConfig, planes: Planes) -> int:
    """How many workers a cluster has CPUs for beside the stream."""
    either, train, data = (plane.get("CPU", 0.0) for plane in (planes.either, planes.train, planes.data))
    if data < config.data_cpus:
        return 0
    return int(min(train, either - config.data_cpus) // config.cpus_per_worker)


def refuse_too_few_cpus(config: ClusterConfig, planes: Planes, workers: int) -> None:
    """Refuse workers that do not fit, or that would leave the stream too little.

    Raises:
        ClusterError: with how many would fit.
    """
    cpus, to_train = planes.either.get("CPU", 0.0), planes.train.get("CPU", 0.0)
    wanted = workers * config.cpus_per_worker
    if wanted <= to_train and planes.cpus_left(wanted) >= config.data_cpus:
        return
    fitting = workers_that_fit(config, planes)
    fix = f"use cluster.workers={fitting}, or add CPUs" if fitting > 0 else (
        "add CPUs; where an autoscaler adds them, set cluster.workers"
    )  # fmt: skip
    if to_train < cpus and to_train < wanted:
        raise ClusterError(
            f"{workers} workers of {config.cpus_per_worker:g} CPUs do not fit on the nodes of cluster.train_labels",
            where="cluster.workers", got=f"{to_train:g} CPUs on them", expected=f"at least {wanted:g}", fix=fix,
        )  # fmt: skip
    raise ClusterError(
        f"{workers} workers of {config.cpus_per_worker:g} CPUs would leave Ray Data less than {config.data_cpus}, "
        "and the stream would never start",
        where="cluster.workers", got=f"a cluster of {cpus:g} CPUs", expected=f"at least {wanted + config.data_cpus:g}",
        fix=fix,
    )  # fmt: skip
