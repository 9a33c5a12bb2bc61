"""A head and two labelled nodes on this machine, run as a program with a Ray of its own.

    python -m tests.integration.two_planes CONFIG

Trains by CONFIG and prints a JSON line: for each role of a node, how many tasks of the stream and train workers ran
there. Each node is a raylet with processes of its own; the train node has two CPUs that nobody asked for.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

import ray
from ray.cluster_utils import Cluster

from tests.servers.seaweed import free_port


def main(config: str) -> None:
    """Train, and tell where."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    )
    cluster.add_node(num_cpus=3, labels={"simclr-role": "train"})
    cluster.add_node(num_cpus=2, labels={"simclr-role": "data"})
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        from ray.util.state import list_actors, list_tasks

        from simclr_ray.train.pretrain import pretrain

        roles = {node["NodeID"]: node["Labels"].get("simclr-role", "head") for node in ray.nodes()}
        pretrain(config)
        tasks = [
            one for one in list_tasks(limit=10_000, raise_on_missing_output=False)
            if one.type == "NORMAL_TASK" and one.node_id and one.state == "FINISHED"
            and ("Units" in one.name or "Repartition" in one.name)
        ]  # fmt: skip
        workers = [
            one for one in list_actors(limit=1000, raise_on_missing_output=False) if "RayTrainWorker" in one.class_name
        ]
        told = {
            "stream": Counter(roles[one.node_id] for one in tasks),
            "workers": Counter(roles[one.node_id] for one in workers),
            "names": sorted({one.name for one in tasks}),
        }
        print(json.dumps(told))  # noqa: T201  what its caller reads
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
