"""The jobs API of a cluster's dashboard, with errors that are sentences.

Who can reach a dashboard that asks for no token can run any program on the cluster. So before anything is sent, one
request without a token finds out whether this one does; an open one on another machine is refused unless told.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.storage.redaction import redact

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

KNOCK_TIMEOUT_S = 10.0
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


def on_this_machine(address: str) -> bool:
    """Whether the host of a URL is the loopback interface, by every address that its name has."""
    host = urllib.parse.urlsplit(address).hostname or ""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(one).partition("%")[0]).is_loopback for one in found)


def knock(address: str) -> Literal["open", "guarded"]:
    """Ask the jobs API without a token: whether it would do anyone's bidding.

    Raises:
        ClusterError: nobody answers.
    """
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Accept": "application/json"})  # noqa: S310
    opener = urllib.request.build_opener(_StayHere)  # a login page elsewhere is a guard
    try:
        with opener.open(request, timeout=KNOCK_TIMEOUT_S) as answer:
            return "open" if answer.status == 200 and "json" in answer.headers.get("Content-Type", "") else "guarded"
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise ClusterError("the dashboard is not well", where=address, got=f"HTTP {error.code}") from None
        return "guarded"
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray dashboard answers: {error}", where=address,
            fix="is it the dashboard's port (8265, not 6379), and `ray[default]` installed on the head? "
            "On Kubernetes: kubectl port-forward service/CLUSTER-head-svc 8265",
        ) from None  # fmt: skip


class _StayHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def refuse_open(address: str, *, allow: bool, say: Callable[[str], None]) -> None:
    """Warn of a dashboard on another machine that asks for no token, and refuse it unless allowed.

    Raises:
        ClusterError: it is open and not allowed, or nobody answers.
    """
    if knock(address) == "guarded" or on_this_machine(address):
        return
    exposure = f"the dashboard at {address} asks for no token, so whoever reaches it can run any program on the cluster"
    if not allow:
        raise ClusterError(
            exposure, fix="start the cluster with RAY_AUTH_MODE=token, or send it all the same with "
            "--allow-unauthenticated",
        )  # fmt: skip
    say(f"WARNING: {exposure}")


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
