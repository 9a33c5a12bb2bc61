"""What a running cluster would give a run: resources now and at most, versions, guard, disks. For `check`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import ray
import ray._private.worker
import torch
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.state import state

from simclr_ray.config import ClusterConfig, Config
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ClusterError, first_line, root_cause
from simclr_ray.train.cluster import (
    ask_nodes,
    connected,
    living_nodes,
    prints_logged,
    refuse_differences,
    resolve_workers,
    versions,
    workers_asked,
)
from simclr_ray.train.cost import Rates
from simclr_ray.train.dashboard import exposure, knock, on_this_machine
from simclr_ray.train.derive import Derived, bytes_ahead, check_world_size
from simclr_ray.train.measure import measure_step, measure_stream
from simclr_ray.train.planes import Planes, planes_of

ROOM_S = 45.0
"""Longest wait for room on a node, and for what is measured there."""
ANSWER_S = 20.0
"""Longest wait for the nodes; a process starts and loads torch there."""
FULL = 0.95
"""Ray does not spill to a disk that is fuller (its `local_fs_capacity_threshold`)."""
_GIB = 1 << 30
T = TypeVar("T")
HERE = "on this machine"


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself."""

    versions: Mapping[str, str]
    spill_folder: str
    disk_total: int
    disk_free: int


def is_given(config: ClusterConfig) -> bool:
    """Whether there is a running cluster to look at."""
    return bool(config.address or os.environ.get("RAY_ADDRESS"))


def cluster_findings(config: Config, manifest: Manifest, derived: Derived) -> Iterator[str | Rates]:
    """Yield findings about the cluster that is given, a sentence each, and in the end what was measured on its nodes.

    Raises:
        ClusterError: it does not answer, its nodes have other versions, or what is asked can never be had there.
        DataError: more images than the limit cannot be used.
        StorageError: a node cannot read the images.
    """
    with connected(config.cluster), prints_logged():
        planes = planes_of(config.cluster, ray.nodes())
        attainable = state.get_max_resources_from_cluster_config()
        yield from resources(config.cluster, planes, ray.available_resources(), attainable)
        if config.cluster.workers is None and not attainable:
            check_world_size(resolve_workers(config.cluster, planes)[0], derived)
        yield from _guard()
        facts, silent = ask_nodes(_facts, ANSWER_S)
        refuse_differences({node: fact.versions for node, fact in facts.items()})
        yield f"versions: {len(facts)} of {len(living_nodes())} nodes have those of this machine" + (
            f"; {', '.join(silent)} did not answer within {ANSWER_S:.0f} s" if silent else ""
        )
        yield from disks(facts, bytes_ahead(config, derived))
        yield from _measured_there(config, manifest, planes)


def _measured_there(config: Config, manifest: Manifest, planes: Planes) -> Iterator[str | Rates]:
    """Reading and views by a task where views are made, encoder and loss by one where training is."""
    cluster = config.cluster
    workers, use_gpu = workers_asked(cluster, planes)
    where, stream = _on_a_node(measure_stream, config, manifest, num_cpus=1, labels=cluster.data_labels)
    yield from _elsewhere(where, "reading and views")
    yield from (f"{one} ({where})" for one in stream.said)
    where, step = _on_a_node(
        measure_step, config, stream.views, num_cpus=cluster.cpus_per_worker, num_gpus=int(use_gpu),
        labels=cluster.train_labels,
    )  # fmt: skip
    yield from _elsewhere(where, "encoder and loss")
    yield from (f"{one} ({where})" for one in step.said)
    if use_gpu and where.startswith(HERE) and not torch.cuda.is_available():
        yield "no expected time: a GPU of the cluster could not be measured"
        return
    left = planes.cpus_left(workers * cluster.cpus_per_worker)
    yield Rates(stream.rates, step.rates, workers, max(left, cluster.data_cpus))


def _elsewhere(where: str, what: str) -> Iterator[str]:
    """A warning where no node of the cluster was measured."""
    if where.startswith(HERE):
        yield f"WARNING: {what} were measured {where}; expected times are this machine's, not the cluster's"


def _on_a_node(
    measure: Callable[..., T], *arguments: object, labels: Mapping[str, str] | None, **resources: float
) -> tuple[str, T]:
    """Call it in a task on a node of these labels, or here where none answers; where it was, and the answer."""
    selector = dict(labels) if labels else None
    task = ray.remote(_at_home).options(label_selector=selector, max_retries=0, **resources)
    answer = task.remote(measure, *arguments)
    ready, _ = ray.wait([answer], timeout=ROOM_S)
    if not ready:  # a cluster that waits for its autoscaler, or is at work
        ray.cancel(answer, force=True)
        return f"{HERE}, for no node of the cluster had done it within {ROOM_S:.0f} s", measure(*arguments)
    try:
        node, found = ray.get(answer)
    except ray.exceptions.RayError as error:
        lost = ClusterError(f"measuring on a node failed: {first_line(error)}", where="cluster")
        raise root_cause(error) or lost from None
    addresses = {one["NodeID"]: one["NodeManagerAddress"] for one in living_nodes()}
    return f"on {addresses.get(node, 'a node that is gone')}", found


def _at_home(measure: Callable[..., T], *arguments: object) -> tuple[str, T]:
    return str(ray.get_runtime_context().get_node_id()), measure(*arguments)


def resources(
    config: ClusterConfig, planes: Planes, free: Mapping[str, float], attainable: Mapping[str, float] | None
) -> Iterator[str]:
    """Asked, there, free and at most to be had; pure arithmetic.

    Args:
        config: What is asked.
        planes: Of the nodes that are there.
        free: Resources that nobody uses now.
        attainable: What the autoscaler may bring the cluster to; None where there is none, or Ray does not say, as
            autoscalers of Ray 2.60 do not.

    Raises:
        ClusterError: what is asked is more than can ever be there.
    """
    there, more = planes.either, attainable or {}
    names = [name for name in ("CPU", "GPU") if there.get(name) or more.get(name)]
    listed = ", ".join(f"{there.get(name, 0):g} {name}s ({free.get(name, 0):g} free)" for name in names)
    most = ", ".join(f"{more.get(name, 0):g} {name}s" for name in names)
    yield f"cluster: {listed or 'no CPUs'}" + (f"; the autoscaler may bring it to {most}" if more else "")
    if config.train_labels or config.data_labels:
        yield (
            f"planes: {planes.train.get('CPU', 0):g} CPUs and {planes.train.get('GPU', 0):g} GPUs for training, "
            f"{planes.data.get('CPU', 0):g} CPUs for the stream"
        )
    workers, use_gpu = workers_asked(config, planes)
    gpus = workers if use_gpu else 0
    asked = {"CPU": workers * config.cpus_per_worker + config.data_cpus, "GPU": float(gpus)}
    words = f"{asked['CPU']:g} CPUs and {gpus} GPUs for {workers} worker{'s' * (workers > 1)} and the stream"
    limit = {name: max(there.get(name, 0.0), more.get(name, 0.0)) for name in asked}
    short = [name for name in asked if asked[name] > limit[name]]
    if short and more:
        raise ClusterError(
            f"the cluster can never give {words}", where="cluster.workers",
            got=", ".join(f"at most {limit[name]:g} {name}s" for name in short),
            fix="use fewer workers, or raise the maximum of the node group (max_workers, maxReplicas)",
        )  # fmt: skip
    if missing := list(_missing(config, planes, workers, gpus)):
        yield (
            f"WARNING: asked: {words}; not there now: {', '.join(missing)}. An autoscaler will be asked for them and "
            "waited for (cluster.start_timeout_s), but Ray does not say what it may add; without one, no run can start"
        )
        return
    late = [f"{name}s" for name in asked if asked[name] > free.get(name, 0.0)]
    yield f"asked: {words}; " + (
        f"{' and '.join(late)} must be freed first (cluster.start_timeout_s)" if late else "free now"
    )


def _missing(config: ClusterConfig, planes: Planes, workers: int, gpus: int) -> Iterator[str]:
    """What the nodes that are there, busy or not, do not have, on the plane that needs it."""
    train, cpus = planes.train, workers * config.cpus_per_worker
    if train.get("CPU", 0.0) < cpus:
        yield f"{cpus - train.get('CPU', 0.0):g} CPUs for training"
    if train.get("GPU", 0.0) < gpus:
        yield f"{gpus - train.get('GPU', 0.0):g} GPUs for training"
    if (left := max(0.0, planes.cpus_left(min(cpus, train.get("CPU", 0.0))))) < config.data_cpus:
        yield f"{config.data_cpus - left:g} CPUs for the stream"


def _guard() -> Iterator[str]:
    """Whether the cluster asks for a token, and whether its dashboard does."""
    guarded = is_token_auth_enabled()
    url = ray._private.worker.get_dashboard_url()
    address = f"http://{url}" if url and "://" not in url else url
    if not address:
        yield "dashboard: none, so there are no jobs, sweeps or metrics; start the head with ray[default] installed"
        return
    try:
        dashboard = knock(address)
    except ClusterError as error:
        yield f"dashboard: {address} does not answer from here ({error.what}); jobs and sweeps need it"
        return
    if dashboard == "open" and not on_this_machine(address):
        yield f"WARNING: {exposure(address)}; start the cluster with RAY_AUTH_MODE=token"
    yield f"token: {'asked for' if guarded else 'none'}; dashboard at {address}: {dashboard}"


def _facts() -> NodeFacts:
    """Runs on each node."""
    node = ray._private.worker.global_worker.node
    folder = str(node.get_session_dir_path())
    usage = shutil.disk_usage(folder)
    return NodeFacts(versions(), folder, usage.total, usage.free)


def disks(facts: Mapping[str, NodeFacts], ahead: int) -> Iterator[str]:
    """Where objects go that the store has no room for; pure arithmetic.

    Args:
        facts: By node.
        ahead: Bytes of finished views that may wait for the workers.
    """
    if not facts:
        return
    node, least = min(facts.items(), key=lambda item: item[1].disk_free)
    yield (
        f"disk for spilling: at least {least.disk_free / _GIB:,.1f} GiB free on each node (least on {node}); the "
        f"stream keeps up to {ahead / _GIB:,.2f} GiB ahead and spills only what its object store cannot hold"
    )
    for name, fact in facts.items():
        used = 1 - fact.disk_free / fact.disk_total
        if used > FULL:
            yield f"WARNING: the disk of {name} is {used:.1%} full, and Ray spills nothing above {FULL:.0%}"
