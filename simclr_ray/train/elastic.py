"""A group of workers that grows and shrinks with the cluster, and leaves the stream its CPUs.

Ray Train alone takes all that is left after a lost node, up to the most workers asked for; on CPUs it then takes the
one that the stream lives on, and the run stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError
from simclr_ray.train.cluster import draining_nodes
from simclr_ray.train.planes import Planes, planes_of, refuse_too_few_cpus, workers_that_fit

SAY_WAITING_S = 30.0
LOOK_S = 2.0


class PretrainTrainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer; an elastic group of it has at most the workers that fit beside the stream."""

    def __init__(self, *arguments: Any, cluster: ClusterConfig, desk: Any, **settings: Any) -> None:
        """As `TorchTrainer`; `cluster` says what workers and stream need, at the `desk` is told what happens."""
        super().__init__(*arguments, **settings)
        self._cluster, self._desk = cluster, desk

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        # Ray has no setting for a policy of one's own; it makes one and hands it to the controller here.
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = BesideTheStream(self.scaling_config, self._cluster, self._desk)
        return super()._initialize_and_run_controller(**parts)


class BesideTheStream(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's policy, which asks an autoscaler for the most workers still, but has no more than fit beside the stream.

    Nodes that are about to go count for a group that runs, which may yet save, and not for one that starts. Ray's own
    would wait for room without an end, and hear of no stop meanwhile.
    """

    def __init__(self, scaling_config: ScalingConfig, cluster: ClusterConfig, desk: Any) -> None:
        super().__init__(scaling_config)
        self._cluster, self._desk = cluster, desk
        self._starting = True
        self._waiting_since: float | None = None
        self._said = 0.0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start with what there is.

        Raises:
            ClusterError: it was too little for `cluster.start_timeout_s`, or a stop was asked for meanwhile.
        """
        self._starting = True
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            self._wait()
        else:
            self._waiting_since = None
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Shrink at once where the stream was left no CPU, for nothing goes on then; else as Ray has it."""
        self._starting = False
        fitting = self._fitting()
        if self.scaling_config.min_workers <= fitting < worker_group_state.num_workers:
            self._desk.say.remote(
                f"{worker_group_state.num_workers} workers leave the stream no CPU now; going on with {fitting}"
            )
            return self._get_resize_decision(fitting)
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _wait(self) -> None:
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = self._said = now
        room, least = max(0, self._fitting()), self.scaling_config.min_workers
        if now - self._waiting_since > self._cluster.start_timeout_s:
            error = ClusterError(
                f"no room for workers for {self._cluster.start_timeout_s:g} s (cluster.start_timeout_s)",
                where="cluster.min_workers", got=f"room for {room} beside the stream", expected=f"at least {least}",
                fix="add nodes and run the same command again; it continues from the newest checkpoint",
            )  # fmt: skip
            ray.get(self._desk.fail.remote(error))
            raise error
        if ray.get(self._desk.stopping.remote()):
            raise ClusterError("stopped while waiting for room for workers")
        if now - self._said > SAY_WAITING_S:
            self._said = now
            self._desk.say.remote(
                f"waiting for nodes: room for {room} workers beside the stream, at least {least} are wanted "
                "(cluster.min_workers)"
            )

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return min(int(super()._count_possible_workers(reserved_resources)), self._fitting())

    def _fitting(self) -> int:
        going = draining_nodes() if self._starting else frozenset()
        nodes = [node for node in ray.nodes() if node["NodeID"] not in going]
        return workers_that_fit(self._cluster, planes_of(self._cluster, nodes))


class StreamPlace:
    """Asks for a node for the stream where there is none yet, until the workers train.

    The stream's own tasks ask for one when it starts, which is after the workers have come; and an elastic group waits
    for room beside the stream before it starts. Asked for at once, a cluster without nodes grows both kinds together.
    """

    def __init__(self, config: ClusterConfig, planes: Planes) -> None:
        self._group: PlacementGroup | None = None
        if planes.data.get("CPU", 0.0) < config.data_cpus:
            labels = [dict(config.data_labels)] if config.data_labels else None
            self._group = placement_group([{"CPU": float(config.data_cpus)}], bundle_label_selector=labels)

    def free(self) -> None:
        """Leave it to the stream. May be called again."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


class Room:
    """The driver's look at whether the workers that train leave the stream a CPU: it would wait for one for ever.

    A running cluster is taken at its word that it has room for a stated number of workers, for an autoscaler may still
    add nodes; and nodes may go. An elastic group is made smaller meanwhile, where it may be.
    """

    def __init__(self, config: ClusterConfig, say: Callable[[str], None], place: StreamPlace) -> None:
        """`place` is given up to the stream as soon as workers train."""
        self._config, self._say, self._place = config, say, place
        self._since: float | None = None
        self._said = self._looked = 0.0

    def look(self, workers: int) -> None:
        """Say that there is none now and then.

        Raises:
            ClusterError: there was none for `cluster.start_timeout_s`.
        """
        self._place.free()
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        try:
            refuse_too_few_cpus(self._config, planes_of(self._config, ray.nodes()), workers)
        except ClusterError as error:
            if self._since is None:
                self._since = self._said = now
            if now - self._since > self._config.start_timeout_s:
                raise
            if now - self._said > SAY_WAITING_S:
                self._said = now
                self._say(f"waiting for a CPU for the stream: {error.what} (got {error.got})")
        else:
            self._since = None
