"""The jobs API of a cluster's dashboard, with errors that are sentences.

Who can reach a dashboard that asks for no token can run any program on the cluster. So before anything is sent, one
request without a token finds out whether this one does; an open one on another machine is refused unless told.
"""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.storage.redaction import redact
from simclr_ray.train.dashboard import exposure, knock, on_this_machine

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Ray's own, of the dashboard."""
_HOW_TO_AUTHENTICATE = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with the cluster's token (KubeRay keeps it in a Secret); "
    "`ray get-auth-token` prints the one of a machine"
)


def dashboard_address(given: str | None) -> str:
    """The dashboard's URL, from the command line or `RAY_API_SERVER_ADDRESS`.

    Raises:
        ConfigError: none is given, or it is no address of a dashboard.
    """
    address = given or os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise ConfigError(
            "no address of a cluster", where="--address", expected="its dashboard's, such as http://HOST:8265",
            fix=f"give --address, or set {ADDRESS_VARIABLE}",
        )  # fmt: skip
    url = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
    if url.scheme not in ("http", "https") or not url.hostname or url.username or url.password:
        raise ConfigError(
            "jobs are sent to the dashboard", where="--address", got=redact(address),
            expected="http://HOST:8265 or https://HOST, without a password in it",
        )  # fmt: skip
    return urllib.parse.urlunsplit((url.scheme, url.netloc, url.path.rstrip("/"), "", ""))


def refuse_open(address: str, *, allow: bool, say: Callable[[str], None]) -> None:
    """Warn of a dashboard on another machine that asks for no token, and refuse it unless allowed.

    Raises:
        ClusterError: it is open and not allowed, or nobody answers.
    """
    if knock(address) == "guarded" or on_this_machine(address):
        return
    if not allow:
        raise ClusterError(
            exposure(address), fix="start the cluster with RAY_AUTH_MODE=token, or send it all the same with "
            "--allow-unauthenticated",
        )  # fmt: skip
    say(f"WARNING: {exposure(address)}")


@contextlib.contextmanager
def jobs_client(address: str) -> Iterator[JobSubmissionClient]:
    """The jobs API; what it raises within becomes a sentence.

    Raises:
        ClusterError: the token is refused, nobody answers, or the cluster cannot do what is asked.
    """
    with told(address):
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise ClusterError(
                "Ray's jobs API is not installed here", got=str(error), fix="pip install 'simclr-ray[dashboard]'"
            ) from None
        yield JobSubmissionClient(address)


@contextlib.contextmanager
def told(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into sentences."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        why = "it was wrong" if "Forbidden" in str(error) or "failed" in str(error) else "none was sent"
        raise ClusterError(f"token refused: {why}", where=address, fix=_HOW_TO_AUTHENTICATE) from None
    except RuntimeError as error:  # of the SDK: an answer that is not 200
        raise ClusterError(_reason(str(error)), where=address) from None
    except OSError as error:  # requests' and aiohttp's errors of connections, and Ray's ConnectionError
        raise ClusterError(f"the connection broke: {redact(str(error))}", where=address) from None


def _reason(text: str) -> str:
    """The last line of what a server raised; the rest is its traceback."""
    lines = [line.strip() for line in redact(text).splitlines() if line.strip(" .")]
    return lines[-1].removeprefix("RuntimeError: ") if lines else "the cluster refused"
