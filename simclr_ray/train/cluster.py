"""Getting a Ray cluster: joining a running one, or starting a local one with room for the stream.

Train workers must never take every CPU: Ray Data would wait for one for ever. A local cluster is therefore declared
with as many CPUs as workers and stream need, and on a running one the room is checked before training starts.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, Literal, TypeVar

import ray
import ray.exceptions
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from simclr_ray import storage
from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError, first_line, root_cause
from simclr_ray.train.address import HOOK
from simclr_ray.train.planes import Planes, refuse_empty_planes, refuse_too_few_cpus, whole
from simclr_ray.version import __version__
from simclr_ray.views.make import Maker
from simclr_ray.views.stage import Where

log = logging.getLogger("simclr_ray.ray")
T = TypeVar("T")

PROBE_TIMEOUT_S = 10.0
_LOST: Final = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.RaySystemError,
)
_STATE_API: Final = "RAY_API_SERVER_ADDRESS"
_NOBODY: Final = "http://127.0.0.1:9"
"""Ray Train asks the State API every second whether its controller lives, and takes the workers away if not. Where it
is not told whom to ask, it asks the cluster that was started last on the machine, and if that is another one, which
knows no such controller, a healthy run loses its workers (Ray 2.60). A local cluster has no State API: asking nobody is
an error to Ray, after which it leaves the workers alone."""
_VERSIONS_TIMEOUT_S = 60.0
"""A node that says nothing for so long is busy starting; its versions are not known then."""
CPUS_FOR_A_GPU: Final[Mapping[Maker, int]] = {"kernel": 3, "opencv": 5, "torch": 12}
"""CPUs that keep one GPU busy with finished views; below that, the stream had better leave the colours to it.

An H100 is taken to need the pairs of 1,250 images a second (ResNet-50 at 224 pixels, in bfloat16: an estimate). From
JPEGs of 500 x 375 a core makes 953 a second by the C kernel, 549 by OpenCV, 213 by torch
(`benchmarks/results/views.json`), so that 1.3, 2.3 and 5.9 cores are busy with views alone. Twice that, rounded up: a
core makes 0.4 to 0.7 of it at 1024 x 768, a CPU of a cloud is often half a core, and shards have to be read too.
"""


@contextlib.contextmanager
def connected(config: ClusterConfig, *, runs: int = 1, state_api: bool = False) -> Iterator[None]:
    """Hold a Ray connection; what was started here is stopped at the end, what was there before stays.

    Args:
        config: Of the cluster.
        runs: Trainings side by side that a local Ray is declared with room for.
        state_api: Start a local Ray with its dashboard, and let every process know its address: Ray's State API needs
            both where several Rays run on a machine.

    The storage settings of this process reach all tasks and actors: a local cluster inherits its environment, to a
    running one they go as the job's `env_vars`. Credentials do not travel; each node has its own.

    Raises:
        ClusterError: a given address does not answer or refuses the token, or a part of Ray that the work needs was
            lost on the way.
    """
    if ray.is_initialized():
        _say_what_stays_behind()
        with _losses_said():
            yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.start_timeout_s)
    calm: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    hook = {"worker_process_setup_hook": HOOK} if state_api else {}
    address = config.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _probe(address)
            settings = storage.environment(storage.current()) | told_whom_to_ask(address)
            ray.init(address=address, runtime_env={"env_vars": settings, **hook}, **calm)
        else:
            cpus = local_cpus(config, runs)
            with contextlib.nullcontext() if state_api else asking_nobody():
                # "local": without it, Ray would join any cluster that somebody has started on this machine.
                ray.init(address="local", num_cpus=cpus, include_dashboard=state_api, runtime_env=hook or None, **calm)
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        if _token_refused(error):
            raise ClusterError(
                "token refused: none, or a wrong one", where=f"cluster.address={address}",
                fix="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with the cluster's token",
            ) from None  # fmt: skip
        raise ClusterError(
            f"no Ray cluster answers: {error}",
            where=f"cluster.address={address}",
            fix="start one with: ray start --head, or leave cluster.address empty for a local one",
        ) from None
    _quiet()
    try:
        with _losses_said():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _losses_said() -> Iterator[None]:
    """Say in a sentence that a process of Ray's is gone: a killed actor of the driver's, the raylet, the head."""
    try:
        yield
    except _LOST as error:
        cause = root_cause(error)
        if cause is not None:
            raise cause from error
        raise ClusterError(
            f"a part of the Ray cluster was lost: {first_line(error)}",
            fix="run the same command again; it continues",
        ) from error


def told_whom_to_ask(address: str) -> dict[str, str]:
    """Environment for the tasks and actors of a running cluster: their own State API, see `_NOBODY`."""
    host, _, port = address.rpartition(":")
    known = "://" not in address and host and port.isdigit()
    return {"RAY_ADDRESS": address} if known else {}


@contextlib.contextmanager
def variables(**wanted: str) -> Iterator[None]:
    """Variables of the environment for what is started inside; taken back at the end."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def asking_nobody() -> AbstractContextManager[None]:
    """Around the start of a local cluster without a State API, whose processes inherit the environment."""
    return variables(**{_STATE_API: _NOBODY})


def _say_what_stays_behind() -> None:
    """Warn where Ray runs already and its tasks will not see this process's storage settings."""
    wanted = storage.environment(storage.current(), given={})
    carried = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    missing = sorted(name for name, value in wanted.items() if carried.get(name) != value)
    if missing:
        log.warning(
            "Ray was started before this call, so its tasks reach object stores as their own environment says, not as "
            "the settings under storage: do; start Ray with runtime_env={'env_vars': storage.environment("
            "storage.current())}, or set %s where its nodes start",
            ", ".join(missing),
        )


def _token_refused(error: BaseException | None) -> bool:
    """Ray says so only in what its `ConnectionError` came of, as an error of its own or in another one's text."""
    while error is not None:
        if isinstance(error, ray.exceptions.AuthenticationError) or "InvalidAuthToken" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _probe(address: str) -> None:
    """Knock at host:port first, for `ray.init` tries for minutes where nobody listens.

    Raises:
        ConnectionError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like: Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(str(error)) from None


def beside_the_driver(actor: Any) -> Any:
    """Keep a small actor of the driver's on the driver's node: on another it would be lost with that node."""
    node = ray.get_runtime_context().get_node_id()
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


@contextlib.contextmanager
def prints_logged() -> Iterator[None]:
    """Send what Ray prints on standard output to the log `simclr_ray.ray`; a console made before keeps its stream.

    `log_to_driver=False` silences workers, but messages of the raylet are printed by a thread of the driver.
    """
    with contextlib.redirect_stdout(_ToLog()):
        yield


class _ToLog(io.TextIOBase):
    def write(self, text: str) -> int:
        if text.strip():
            log.info("%s", text.rstrip())
        return len(text)


def versions() -> dict[str, str]:
    """Of what must agree on all nodes: other versions may compute, order or serialise otherwise."""
    packages = ("ray", "torch", "torchvision", "numpy", "pyarrow", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    # Of this package the code's own word: a job may have brought its source, which is not installed.
    return {"python": ".".join(map(str, sys.version_info[:2])), "simclr_ray": __version__} | found


def differences(mine: Mapping[str, str], theirs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each package and node with another version than the driver's."""
    return [
        f"{name}: {wanted} here, {found.get(name)} on node {node}"
        for node, found in sorted(theirs.items())
        for name, wanted in mine.items()
        if found.get(name) != wanted
    ]


def ask_nodes(question: Callable[[], T], timeout_s: float) -> tuple[dict[str, T], list[str]]:
    """Call a function on every living node.

    Returns:
        Answers by the node's address and the start of its id, and the nodes that gave none in time (busy starting).
    """
    nodes = {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})" for node in living_nodes()}
    ask = ray.remote(num_cpus=0)(question)
    asked = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    }
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    answers, silent = {}, []
    for node, answer in asked.items():
        try:
            if answer not in set(ready):
                raise ray.exceptions.GetTimeoutError
            answers[nodes[node]] = ray.get(answer)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RaySystemError, ray.exceptions.TaskUnschedulableError):
            silent.append(nodes[node])  # or it went meanwhile
    return answers, silent


def living_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def refuse_other_versions() -> None:
    """Ask every node of a cluster that was not started here for its versions.

    Raises:
        ClusterError: a node has others than the driver.
    """
    if len(living_nodes()) > 1:
        refuse_differences(ask_nodes(versions, _VERSIONS_TIMEOUT_S)[0])


def refuse_differences(theirs: Mapping[str, Mapping[str, str]]) -> None:
    """Compare versions of nodes with those here.

    Raises:
        ClusterError: some differ.
    """
    lines = differences(versions(), theirs)
    if lines:
        raise ClusterError(
            "nodes of the cluster have other versions than the driver:\n" + "\n".join(f"  {line}" for line in lines),
            fix="use one image or environment for driver and nodes",
        )


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that will be taken away, as the cluster was told (a spot notice, the autoscaler).

    Ray Train has this as `get_preemption_info`, which is a barrier of all ranks; the driver needs to know without one.
    """
    try:
        return frozenset(state.get_draining_nodes())
    except (AttributeError, ray.exceptions.RayError):
        return frozenset()  # another version of Ray's: only the extra checkpoint is lost


def local_cpus(config: ClusterConfig, runs: int = 1) -> int:
    """CPUs to declare for a local cluster: the machine's, or more where workers and stream need more."""
    needed = math.ceil(runs * (config.workers or 1) * config.cpus_per_worker) + config.data_cpus
    return max(usable_cores(), needed)


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_asked(config: ClusterConfig, planes: Planes) -> tuple[int, bool]:
    """Number of workers and whether each has a GPU; what the config leaves open follows from the cluster's GPUs."""
    gpus = int(planes.train.get("GPU", 0))
    use_gpu = config.use_gpu if config.use_gpu is not None else gpus > 0
    return config.workers or (max(1, gpus) if use_gpu else 1), use_gpu


def resolve_workers(config: ClusterConfig, cluster: Planes | dict[str, float]) -> tuple[int, bool]:
    """Number of workers and whether each has a GPU, from the config and what the cluster has.

    A running cluster that was asked for a stated number of workers is taken at its word, for it may grow.

    Raises:
        ClusterError: the workers would leave the stream no CPU.
    """
    planes = cluster if isinstance(cluster, Planes) else whole(cluster)
    gpus = int(planes.train.get("GPU", 0))
    workers, use_gpu = workers_asked(config, planes)
    may_grow = bool(config.workers) and bool(config.address or os.environ.get("RAY_ADDRESS"))
    if may_grow:
        return workers, use_gpu  # an autoscaler may add nodes; `start_timeout_s` decides
    refuse_empty_planes(config, planes)
    refuse_too_few_cpus(config, planes, workers)
    if use_gpu and gpus < workers:
        raise ClusterError(
            f"{workers} workers need a GPU each", where="cluster.workers", got=f"a cluster of {gpus} GPUs",
            fix="use fewer workers, or cluster.use_gpu=false",
        )  # fmt: skip
    return workers, use_gpu


def resolve_views(
    where: Literal["auto", "cpu", "gpu"], config: ClusterConfig, cluster: Planes | dict[str, float], *,
    workers: int, use_gpu: bool, maker: Maker,
) -> tuple[Where, str]:  # fmt: skip
    """Who does the colours of the views, and why, in words; `maker` is who makes views on the machines of the stream.

    `gpu` is kept where no worker has one: the worker then does the colours on its CPU, the same pictures more slowly.
    """
    planes = cluster if isinstance(cluster, Planes) else whole(cluster)
    if where == "gpu" and not use_gpu:
        gpus = int(planes.train.get("GPU", 0))
        return where, (
            f"as set by views.where, but the workers have no GPU, of which Ray offers {gpus}: each does the colours on "
            "its own CPUs, within its steps; views.where=cpu would do them beside"
        )
    if where != "auto":
        return where, "as set by views.where"
    if not use_gpu:
        return "cpu", "there is no GPU to do them"
    if not planes.data.get("CPU"):
        return "cpu", "no node for the stream is there yet, and an autoscaler adds as many as finished views need"
    left = max(0.0, planes.cpus_left(workers * config.cpus_per_worker)) / workers
    needed = CPUS_FOR_A_GPU[maker]
    words = (
        f"the stream has {left:.1f} CPUs for each GPU; finished views by {maker} are taken to need {needed} (ResNet-50 "
        "on an H100, images of 500 x 375)"
    )
    return ("gpu" if left < needed else "cpu"), words


def _quiet() -> None:
    """Ray's own progress and warnings go to its session logs, not over our console."""
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
