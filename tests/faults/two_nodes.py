"""A cluster of a head and two nodes on this machine, for faults of whole nodes; run as a program with a Ray of its own.

    python -m tests.faults.two_nodes CONFIG EVENT AFTER_STEP

Trains by CONFIG on it, and once AFTER_STEP steps are recorded lets EVENT happen to a node that a rank runs on: `kill`
takes it away at once, `drain` gives notice first, as a spot market does. Prints what the driver's console says, and a
JSON line of what happened. Each node is a raylet with processes of its own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.cluster_utils import Cluster

from simclr_ray.observe.metrics import read_jsonl
from simclr_ray.train.cluster import told_whom_to_ask
from simclr_ray.train.drain import drain
from tests.faults.commands import committed, steps_done, wait_for
from tests.servers.seaweed import free_port

NOTICE_MS = 8_000


def node_of_a_rank(cluster: Cluster) -> Any:
    """A node that a train worker runs on, not the head."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000, raise_on_missing_output=False)
    used = {actor.node_id for actor in actors if "RayTrainWorker" in actor.class_name}
    for node in cluster.worker_nodes:
        if node.node_id in used:
            return node
    raise AssertionError("no rank runs on a worker node")


def main(config: str, event: str, after_step: int) -> None:
    """Train, disturb, tell."""
    folder = Path(yaml.safe_load(Path(config).read_text())["run"]["folder"])
    # A CPU on each: when a node is lost, two are left, for one worker and the stream.
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    happened: dict[str, Any] = {}

    def disturb() -> None:
        wait_for(lambda: steps_done(folder) >= after_step, timeout_s=240)
        node = node_of_a_rank(cluster)
        happened["at_step"] = steps_done(folder)
        started = time.monotonic()
        if event == "drain":
            drain(cluster.address, node.node_id, NOTICE_MS / 1000)
            wait_for(lambda: any(step % 10 for step in committed(folder)), timeout_s=NOTICE_MS / 1000)
            happened["saved"] = [step for step in committed(folder) if step % 10]
            happened["saved_s"] = time.monotonic() - started
            time.sleep(max(0.0, NOTICE_MS / 1000 - (time.monotonic() - started)))
        cluster.remove_node(node, allow_graceful=False)
        happened["gone_s"] = time.monotonic() - started
        wait_for(lambda: any(record.attempt > 1 for record in read_jsonl(folder / "metrics.jsonl")), timeout_s=240)
        happened["next_step_s"] = time.monotonic() - started

    thread = threading.Thread(target=disturb, daemon=True)
    try:
        env = {"env_vars": told_whom_to_ask(cluster.address)}
        ray.init(address=cluster.address, runtime_env=env, log_to_driver=False)
        from simclr_ray.train.pretrain import pretrain

        if event != "none":
            thread.start()
        pretrain(config)
        if event != "none":
            thread.join(30)
        print(json.dumps(happened))  # noqa: T201  what its caller reads
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
