"""A group of workers that grows and shrinks with the cluster, and leaves the stream its CPUs.

Ray Train alone takes all that is left after a lost node, up to the most workers asked for; on CPUs it then takes the
one that the stream lives on, and the run stands still.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError
from simclr_ray.train.cluster import draining_nodes
from simclr_ray.train.planes import planes_of, refuse_too_few_cpus, workers_that_fit

SAY_WAITING_S = 30.0


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

    Nodes that are about to go count for a group that runs, which may yet save, and not for one that starts.
    """

    def __init__(self, scaling_config: ScalingConfig, cluster: ClusterConfig, desk: Any) -> None:
        super().__init__(scaling_config)
        self._cluster, self._desk = cluster, desk
        self._said = time.monotonic()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start with what there is; say now and then that it is too little."""
        decision = super().make_decision_for_non_running_worker_group()
        now = time.monotonic()
        if isinstance(decision, NoopDecision) and now - self._said > SAY_WAITING_S:
            self._said = now
            self._desk.say.remote(
                f"waiting for nodes: room for {max(0, self._fitting(starting=True))} workers beside the stream, "
                f"wanted at least {self.scaling_config.min_workers} (cluster.min_workers)"
            )
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Shrink at once where the stream was left no CPU, for nothing goes on then; else as Ray has it."""
        fitting = self._fitting(starting=False)
        if self.scaling_config.min_workers <= fitting < worker_group_state.num_workers:
            self._desk.say.remote(
                f"{worker_group_state.num_workers} workers leave the stream no CPU now; going on with {fitting}"
            )
            return self._get_resize_decision(fitting)
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return min(int(super()._count_possible_workers(reserved_resources)), self._fitting(starting=True))

    def _fitting(self, *, starting: bool) -> int:
        going = draining_nodes() if starting else frozenset()
        nodes = [node for node in ray.nodes() if node["NodeID"] not in going]
        return workers_that_fit(self._cluster, planes_of(self._cluster, nodes))


def wait_for_room(config: ClusterConfig, workers: int) -> None:
    """See that a group, which is placed already, has left the stream a CPU: it would wait for one for ever.

    A running cluster is taken at its word that it has room for a stated number of workers, for an autoscaler may still
    add nodes. An elastic group that counted a node that had just gone is made smaller meanwhile.

    Raises:
        ClusterError: there is none after `cluster.start_timeout_s`; the group is restarted as after any failure.
    """
    end = time.monotonic() + config.start_timeout_s
    while True:
        try:
            refuse_too_few_cpus(config, planes_of(config, ray.nodes()), workers)
        except ClusterError:
            if time.monotonic() > end:
                raise
            time.sleep(1.0)
        else:
            return
