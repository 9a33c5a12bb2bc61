"""Tell a cluster that this node is about to go, and wait while what runs here saves itself.

    python -m simclr_ray.train.drain --seconds 120

For a pod's preStop hook, or whatever else hears of a spot market's notice first. The driver of a run on this node then
saves a checkpoint (`keeper`), Ray sends nothing new here, and the restart that follows is no failure. Ends at once
when nothing runs here, so that an idle node goes quickly.
"""

from __future__ import annotations

import argparse
import os
import time

import ray
from ray._private.state import state
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2

from simclr_ray.errors import ClusterError

LOOK_S = 1.0
REASON = "DRAIN_NODE_REASON_PREEMPTION"


def drain(address: str, node: str, seconds: float) -> None:
    """Announce the end of a node.

    Args:
        address: Of the cluster, HOST:PORT.
        node: Its id, hexadecimal.
        seconds: That it has left.

    Raises:
        ClusterError: the cluster does not take it.
    """
    deadline_ms = int(1000 * (time.time() + seconds))
    reason = autoscaler_pb2.DrainNodeReason.Value(REASON)
    accepted, why = GcsClient(address=address).drain_node(node, reason, "the node is taken away", deadline_ms)
    if not accepted:
        raise ClusterError(f"the cluster does not let the node go: {why}", where=node)


def is_idle(node: str) -> bool:
    """Whether nothing runs on a node of the cluster that this process is connected to."""
    total: dict[str, float] = next(
        (one["Resources"] for one in ray.nodes() if one["NodeID"] == node and one["Alive"]), {}
    )
    free = state.available_resources_per_node().get(node, {})
    return all(free.get(name, 0.0) >= total.get(name, 0.0) for name in ("CPU", "GPU"))


def main() -> None:
    """Drain the node that this process runs on."""
    parser = argparse.ArgumentParser(description="Announce the end of this node, and wait for what runs on it.")
    parser.add_argument("--seconds", type=float, default=120.0, help="until it goes (default: %(default)s)")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS", "auto"), help="of the cluster")
    options = parser.parse_args()
    ray.init(address=options.address, log_to_driver=False, logging_level="ERROR")
    node = ray.get_runtime_context().get_node_id()
    drain(ray.get_runtime_context().gcs_address, node, options.seconds)
    end = time.monotonic() + options.seconds
    while time.monotonic() < end and not is_idle(node):
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
