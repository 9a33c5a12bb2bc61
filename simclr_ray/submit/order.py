"""What is sent to a cluster: a resolved configuration, the versions it was checked with, the command that runs it.

Nothing here knows Ray or talks to anyone. All that can be found wrong here is found before anything is sent: settings
that cannot work, places that a cluster cannot reach, numbers that do not fit the data set.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, load_config, require_places, to_yaml, use_storage
from simclr_ray.errors import ConfigError, StorageError
from simclr_ray.version import PINNED

CONFIG_NAME = "config.yaml"
"""Of the configuration in the job's working folder."""
STOP_WAIT_S = 600
"""Longest wait for a last checkpoint when a job is stopped; Ray's own default, 3 s, would kill it while it saves."""

VERBS: Final[Mapping[str, int]] = {"pretrain": 0, "check": 0, "evaluate": 1, "embed": 3, "pack": 2, "index": 2}
"""Verbs that can be submitted, and how many folders each takes; 0: a configuration."""
PLACES: Final = ("run.folder", "data.train", "evaluate.train", "evaluate.test")
"""Settings that name a place which the cluster must reach."""


@dataclass(frozen=True)
class JobOrder:
    """A job, ready to be sent."""

    verb: str
    arguments: tuple[str, ...]
    """Of the verb, on the cluster."""
    config: str | None
    """The whole configuration as YAML; None for verbs that take a run folder."""
    run: str
    """The run folder, for people."""
    warnings: tuple[str, ...] = ()

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs, for a shell."""
        return shlex.join(["python", "-m", "simclr_ray.cli", self.verb, *self.arguments])


def order(
    verb: str,
    target: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    folders: Sequence[str] = (),
    options: Sequence[str] = (),
    remote: bool = True,
) -> JobOrder:
    """Check everything that can be checked from here, and resolve it.

    Args:
        verb: One of `VERBS`.
        target: A configuration, or the first folder of verbs that take folders.
        overrides: Such as `["train.global_batch=512"]`.
        folders: The further ones.
        options: Further flags of the verb, such as `--fresh`.
        remote: Whether the cluster is on other machines than this one, which then may not see this one's paths.

    Raises:
        ConfigError: the verb cannot be submitted, or a setting cannot work on a cluster.
        DataError: the data set can be read from here and is missing or broken.
    """
    if verb not in VERBS:
        raise ConfigError(
            "this verb cannot be submitted", where="submit", got=verb, expected=" or ".join(VERBS),
            fix="run it where you are; it takes --address where it needs a cluster",
        )  # fmt: skip
    given = 1 + len(folders)
    if given != max(1, VERBS[verb]):
        raise ConfigError(
            "not the folders that this verb takes" if VERBS[verb] else "this verb takes a configuration and no folders",
            where=f"submit {verb}", got=given, expected=str(VERBS[verb] or 1),
        )  # fmt: skip
    if VERBS[verb]:
        places = {f"folder {number}": place for number, place in enumerate((str(target), *folders), start=1)}
        warnings = _refuse_unreachable(places, remote=remote)
        there = [storage.normalise(place) for place in places.values()]
        flags = [flag for override in overrides for flag in ("--set", override)]
        return JobOrder(verb, (*there, *flags, *options), None, there[-1], tuple(warnings))
    config = load_config(target, overrides)
    require_places(config, *(("data.train",) if verb == "check" else ()))
    places = {key: value for key in PLACES if (value := _value(config, key))}
    warnings = _refuse_unreachable(places, remote=remote) + _look(config)
    values = config.model_dump(mode="json")
    for key, place in places.items():
        section, _, name = key.partition(".")
        values[section][name] = storage.normalise(place)
    if config.cluster.address:
        warnings.append(f"cluster.address={config.cluster.address} is left out: a job joins the cluster it runs on")
        values["cluster"]["address"] = None
    return JobOrder(verb, (CONFIG_NAME, *options), to_yaml(values), config.run.folder or "", tuple(warnings))


def runtime_env(
    folder: Path | None, versions: Mapping[str, str] | None, *, stop_wait_s: int = STOP_WAIT_S,
    package: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The environment of a job: its working folder, the versions that it insists on, and time to save when stopped.

    Args:
        folder: That holds the configuration; Ray uploads it. None for a verb without one.
        versions: Of the packages here; the job refuses to start where the cluster has others. None insists on nothing.
        stop_wait_s: Seconds between the SIGTERM and the SIGKILL of `jobs stop`.
        package: The folder `simclr_ray` to ship, for clusters whose image has none or another; None takes theirs.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s), "PYTHONUNBUFFERED": "1"}
    if versions is not None:
        variables[PINNED] = json.dumps(dict(versions))
    env: dict[str, Any] = {"env_vars": variables}
    env |= {"working_dir": str(folder)} if folder else {}
    return env | ({"py_modules": [str(package)]} if package else {})


def job_id(order: JobOrder) -> str:
    """A name for people that no other job has: verb, run and some random digits."""
    name = re.sub(r"[^A-Za-z0-9-]+", "-", order.run.rstrip("/").rpartition("/")[2]).strip("-")[:40]
    return "-".join(part for part in (order.verb, name, uuid4().hex[:8]) if part)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _refuse_unreachable(places: Mapping[str, str], *, remote: bool) -> list[str]:
    """A warning for each place that only nodes which share a file system can reach.

    Raises:
        ConfigError: a relative path, which would mean another place on other machines.
    """
    local = {key: place.removeprefix("file://") for key, place in places.items() if storage.is_local(place)}
    relative = {key: place for key, place in local.items() if not Path(place).is_absolute()}
    if remote and relative:
        listed = "\n".join(f"  {key}: {place}" for key, place in relative.items())
        raise ConfigError(
            f"a job does not run in this folder, so relative paths would mean other places:\n{listed}",
            expected="a URI such as s3://bucket/folder, or an absolute path that all nodes share",
        )
    return [f"{key}={storage.normalise(place)} must be on a file system that all nodes share"
            for key, place in local.items()]  # fmt: skip


def _look(config: Config) -> list[str]:
    """Derive the run's numbers from the data set where it can be read from here; a sentence where it cannot.

    Raises:
        ConfigError: the numbers do not fit it.
        DataError: it is missing or broken.
    """
    from simclr_ray.data.manifest import read_manifest
    from simclr_ray.train.derive import check_world_size, derive

    use_storage(config)
    folder = storage.normalise(str(config.data.train))
    if storage.is_local(folder) and not Path(folder).exists():
        return [f"data.train={folder} is not on this machine, so its numbers are checked on the cluster only"]
    try:
        manifest = read_manifest(folder)
    except StorageError as error:
        return [f"the data set cannot be read from here, so its numbers are checked on the cluster only: {error.what}"]
    derived = derive(config, manifest)
    if config.cluster.workers:
        check_world_size(config.cluster.workers, derived)
    return []
