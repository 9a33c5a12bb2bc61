"""Jobs from Python: `submit` a verb to a cluster; `status`, `logs`, `stop` and a list of what was submitted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simclr_ray.configure import ConfigSource
from simclr_ray.errors import ConfigError
from simclr_ray.submit import follow as following
from simclr_ray.submit import order as orders
from simclr_ray.submit.client import dashboard_address, jobs_client, refuse_open
from simclr_ray.train.dashboard import on_this_machine
from simclr_ray.version import __version__

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

Say = Callable[[str], None]
SENDS = 3
"""Tries of one submission."""


@dataclass(frozen=True)
class Job:
    """A submitted job, as the cluster knows it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    verb: str
    run: str
    exit_code: int | None
    """Ours (table in the README); None while it has not ended."""
    started_s: float | None
    """Unix time."""
    ended_s: float | None
    verdict: str
    """How it ended, in a sentence; empty while it has not."""

    @property
    def seconds(self) -> float:
        """So far, or in all."""
        return (self.ended_s or time.time()) - self.started_s if self.started_s else 0.0


def submit(
    verb: str,
    target: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    folders: Sequence[str] = (),
    options: Sequence[str] = (),
    job: str | None = None,
    environment: Literal["image", "source"] = "image",
    any_versions: bool = False,
    stop_wait_s: int = orders.STOP_WAIT_S,
    allow_unauthenticated: bool = False,
    say: Say = lambda line: None,
) -> str:
    """Check a configuration, send it, and return the job's id.

    Args:
        verb: One of `order.VERBS`.
        target: A configuration, or the first folder of verbs that take folders (`evaluate`, `pack`, ...).
        overrides: Such as `["train.global_batch=512"]`.
        address: Of the cluster's dashboard; None takes RAY_API_SERVER_ADDRESS.
        folders: The further ones.
        options: Further flags of the verb, such as `--fresh`.
        job: Its id; None makes one from verb and run.
        environment: `image`: the cluster's own installation. `source`: this one's package `simclr_ray` is shipped.
        any_versions: Run even where the cluster has other versions of torch, Ray and the like than this machine.
        stop_wait_s: Seconds that a stopped job has for its last checkpoint.
        allow_unauthenticated: Send it to a cluster on another machine that asks for no token.
        say: Told of warnings.

    Raises:
        ConfigError: a setting cannot work, or the id is taken.
        DataError: the data set can be read from here and is missing or broken.
        ClusterError: the cluster does not answer, refuses the token, or is open to everyone.
    """
    where = dashboard_address(address)
    order = orders.order(
        verb, target, overrides, folders=folders, options=options, remote=not on_this_machine(where)
    )  # fmt: skip
    for warning in order.warnings:
        say(f"note: {warning}")
    refuse_open(where, allow=allow_unauthenticated, say=say)
    name = job or orders.job_id(order)
    with jobs_client(where) as client, _working_folder(order) as folder:
        if job and _exists(client, job):
            raise ConfigError("a job of this id exists already", where="--id", got=job, fix="choose another, or none")
        env = orders.runtime_env(
            folder, None if any_versions else _versions(), stop_wait_s=stop_wait_s,
            package=Path(__file__).parents[1] if environment == "source" else None,
        )  # fmt: skip
        _send(client, order, name, env)
        return name


def _send(client: JobSubmissionClient, order: orders.JobOrder, name: str, env: Mapping[str, Any]) -> None:
    """Submit, again where the connection broke before the answer: the id tells whether the first one came through."""
    metadata = {"verb": order.verb, "run": order.run, "simclr_ray": __version__}
    for left in reversed(range(SENDS)):
        try:
            client.submit_job(
                entrypoint=order.entrypoint, submission_id=name, runtime_env=dict(env), metadata=metadata
            )  # fmt: skip
            return
        except OSError:
            if not left:
                raise
            time.sleep(following.RETRY_S)
            if _exists(client, name):
                return


def _exists(client: JobSubmissionClient, name: str) -> bool:
    return any(one.submission_id == name for one in client.list_jobs())


def follow(job: str, *, address: str | None = None, say: Say) -> Job:
    """Say the lines of a job as they come, until it ends."""
    with jobs_client(dashboard_address(address)) as client:
        return _job(following.follow(client, job, say), job)


def status(job: str, *, address: str | None = None) -> Job:
    """Where a job stands."""
    with jobs_client(dashboard_address(address)) as client:
        return _job(client.get_job_info(job), job)


def logs(job: str, *, address: str | None = None) -> str:
    """All that a job has printed so far."""
    with jobs_client(dashboard_address(address)) as client:
        return str(client.get_job_logs(job))


def stop(job: str, *, address: str | None = None, wait_s: float = orders.STOP_WAIT_S + 60.0) -> Job:
    """Have a job save a last checkpoint and end, and wait until it has.

    Raises:
        ClusterError: it has not ended in time, or there is no such job.
    """
    with jobs_client(dashboard_address(address)) as client:
        client.stop_job(job)
        return _job(following.wait(client, job, wait_s) if wait_s else client.get_job_info(job), job)


def jobs(*, address: str | None = None) -> list[Job]:
    """The submitted jobs that the cluster remembers, the newest first."""
    with jobs_client(dashboard_address(address)) as client:
        found = [_job(one, one.submission_id) for one in client.list_jobs() if one.submission_id]
    return sorted(found, key=lambda one: one.started_s or 0.0, reverse=True)


def _job(details: JobDetails, job: str) -> Job:
    metadata = details.metadata or {}
    ended = details.status.is_terminal()
    return Job(
        job, str(details.status), metadata.get("verb", "?"), metadata.get("run", ""),
        following.exit_code(details) if ended else None,
        details.start_time / 1000 if details.start_time else None,
        details.end_time / 1000 if details.end_time else None,
        following.verdict(job, details) if ended else "",
    )  # fmt: skip


def _versions() -> dict[str, str]:
    from simclr_ray.train.cluster import versions

    return versions()


@contextmanager
def _working_folder(order: orders.JobOrder) -> Iterator[Path | None]:
    """A folder that holds the configuration and nothing else."""
    if order.config is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / orders.CONFIG_NAME).write_text(order.config, encoding="utf-8")
        yield Path(scratch)
