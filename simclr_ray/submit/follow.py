"""Following a job: its lines as they come, and what its end means for our exit code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from simclr_ray.errors import ClusterError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

INTERRUPTED = 130
OURS = frozenset({0, 1, 2, 3, 4, 5, 6, INTERRUPTED})
"""Exit codes of the command line (README); any other is the cluster's doing."""
POLL_S = 0.5
RETRY_S = 2.0
SILENT_FOR_S = 120.0
"""Longest time without any answer while a job is followed."""


class Lines:
    """Whole lines out of a log that comes in pieces, and comes from its beginning again after a broken connection."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._begun = ""
        self._taken = self._position = 0

    def rewind(self) -> None:
        """The next piece begins the log again."""
        self._position = 0

    def take(self, piece: str) -> None:
        """Say the lines that this piece ends and that were not said before."""
        new = piece[max(0, self._taken - self._position) :]
        self._position += len(piece)
        self._taken = max(self._taken, self._position)
        *whole, self._begun = (self._begun + new).split("\n")
        for line in whole:
            self._say(line.rstrip("\r"))

    def end(self) -> None:
        """Say what is left."""
        if self._begun:
            self._say(self._begun)
        self._begun = ""


def follow(client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> JobDetails:
    """Say a job's lines as they come, over broken connections, until it ends.

    Raises:
        ClusterError: the cluster has not answered for two minutes.
    """
    lines = Lines(say)
    heard = time.monotonic()
    while True:
        details = None
        try:
            lines.rewind()
            asyncio.run(_tail(client, job, lines))
            details = client.get_job_info(job)
            heard = time.monotonic()
        except (RuntimeError, OSError) as error:
            if time.monotonic() - heard > SILENT_FOR_S:
                raise ClusterError(
                    f"the cluster has not answered for {SILENT_FOR_S:.0f} s: {error}", where=job,
                    fix=f"the job may go on; look with: simclr-ray jobs status {job}",
                ) from None  # fmt: skip
            time.sleep(RETRY_S)
            continue
        if details.status.is_terminal():
            lines.end()
            return details
        time.sleep(POLL_S)  # the log ended a moment before the status, or its connection was closed in between


async def _tail(client: JobSubmissionClient, job: str, lines: Lines) -> None:
    async for piece in client.tail_job_logs(job):
        lines.take(piece)


def wait(client: JobSubmissionClient, job: str, timeout_s: float) -> JobDetails:
    """Wait for a job's end.

    Raises:
        ClusterError: it has not ended in time.
    """
    end = time.monotonic() + timeout_s
    while not (details := client.get_job_info(job)).status.is_terminal():
        if time.monotonic() > end:
            raise ClusterError(f"the job has not ended after {timeout_s:.0f} s", where=job, got=str(details.status))
        time.sleep(POLL_S)
    return details


def exit_code(details: JobDetails) -> int:
    """Our exit code for a job that ended: its own where it is one of ours, 130 when stopped, 5 for all else."""
    if details.status == "STOPPED":
        return INTERRUPTED
    if details.status == "SUCCEEDED":
        return 0
    code = details.driver_exit_code
    return code if code in OURS and code != 0 else ClusterError.exit_code


def verdict(job: str, details: JobDetails) -> str:
    """How a job ended, in a sentence."""
    if details.status == "SUCCEEDED":
        return f"{job} succeeded"
    if details.status == "STOPPED":
        return f"{job} was stopped; submit it again with the same run.folder to continue"
    if details.driver_exit_code is None:
        last = [line.strip() for line in (details.message or "").splitlines() if line.strip()]
        return f"{job} did not run: {last[-1] if last else details.error_type or 'the cluster does not say why'}"
    code = details.driver_exit_code
    killed = " (killed)" if code < 0 or code in (137, 143) else ""
    return f"{job} failed with exit code {code}{killed}"
