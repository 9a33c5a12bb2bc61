"""Ray Train's own restart, for recovery.py: a worker group that does nothing but tell when it is there.

    python -m benchmarks.recovery_bare FOLDER {worker,node}

Writes the time of every 50 ms that each life of rank 0 sees into FOLDER/alive, until FOLDER/stop is there. `worker`:
in a local Ray; `node`: on a cluster of a head and two nodes, one of which is taken away at FOLDER/kill.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from simclr_ray.train.cluster import asking_nobody, told_whom_to_ask


def alive(config: dict[str, Any]) -> None:
    """The whole training."""
    folder = Path(config["folder"])
    while not (folder / "stop").exists():
        if ray.train.get_context().get_world_rank() == 0:
            with (folder / "alive").open("a") as file:
                file.write(f"{time.time()}\n")
        time.sleep(0.05)


def fit(folder: Path, workers: int | tuple[int, int]) -> None:
    """As `simclr_ray.train.pretrain` asks for its workers."""
    ray.train.torch.TorchTrainer(
        alive,
        train_loop_config={"folder": str(folder)},
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=100, controller_failure_limit=10),
        ),
    ).fit()


def main(folder: Path, event: str) -> None:
    """Train until told to stop."""
    if event == "worker":
        with asking_nobody():
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        fit(folder, 1)
        return
    from ray.cluster_utils import Cluster

    from tests.faults.two_nodes import node_of_a_rank
    from tests.servers.seaweed import free_port

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address

    def take_away() -> None:
        while not (folder / "kill").exists():
            time.sleep(0.05)
        node = node_of_a_rank(cluster)
        (folder / "killed").write_text(str(time.time()))
        cluster.remove_node(node, allow_graceful=False)

    threading.Thread(target=take_away, daemon=True).start()
    try:
        env = {"env_vars": told_whom_to_ask(cluster.address)}
        ray.init(address=cluster.address, runtime_env=env, log_to_driver=False)
        fit(folder, (1, 2))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
