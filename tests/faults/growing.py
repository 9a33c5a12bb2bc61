"""A cluster of a head without CPUs that an autoscaler (v2) may add nodes to, all on this machine.

Ray's own `AutoscalingCluster` ends every Ray of the machine at its start and end, and its example configuration is not
in the wheel; this starts one head as a process of its own, and ends what is below it by process ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.servers.seaweed import free_port

IDLE_MINUTES = 0.2
_ALIVE = 0
T = TypeVar("T")


@dataclass(frozen=True)
class NodeType:
    """Nodes that the autoscaler may add."""

    nodes: int
    """At most."""
    cpus: int
    labels: Mapping[str, str] = field(default_factory=dict)


def provider_config(address: str, types: Mapping[str, NodeType]) -> dict[str, object]:
    """What the autoscaler is told: the fake provider, and types of nodes."""
    return {
        "cluster_name": "growing",
        "max_workers": sum(one.nodes for one in types.values()),
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                name: {
                    "resources": {"CPU": one.cpus, "object_store_memory": 400_000_000}, "labels": dict(one.labels),
                    "node_config": {}, "min_workers": 0, "max_workers": one.nodes,
                }
                for name, one in types.items()
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
        "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [], "setup_commands": [],
        "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip


@contextlib.contextmanager
def growing_cluster(folder: Path, types: Mapping[str, NodeType]) -> Iterator[str]:
    """Address of a head under way that may get nodes of these types; it and they are ended at the end."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(provider_config(address, types)))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0",
        "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={free_port()}",
        f"--ray-client-server-port={free_port()}", "--object-store-memory=400000000",
        "--include-dashboard=true", f"--autoscaling-config={config}",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not _answers(address):
            assert head.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < end, "the head did not start"
            time.sleep(0.5)
        yield address
    finally:
        below = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        for process in (*below, head):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()


def alive_nodes(address: str) -> int:
    """Nodes of the cluster, its head among them."""
    return sum(node.state == _ALIVE for node in GcsClient(address=address).get_all_node_info().values())


def alive_by_label(address: str, label: str) -> Counter[str]:
    """Nodes of the cluster by the value of a label; those without it are left out."""
    nodes = GcsClient(address=address).get_all_node_info().values()
    return Counter(node.labels[label] for node in nodes if node.state == _ALIVE and label in node.labels)


@contextlib.contextmanager
def watched(look: Callable[[], T], every_s: float) -> Iterator[list[T]]:
    """Look now and then, in a thread, for as long as the block takes: all that was seen."""
    seen, done = list[T](), threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            seen.append(look())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    import socket

    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return alive_nodes(address) >= 1
    return False
