"""A cluster's dashboard as a stranger sees it: does it answer, and would it do anyone's bidding?

Its jobs API runs programs by design. One that asks for no token lets everybody who reaches it run them.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.error
import urllib.parse
import urllib.request
from typing import Literal

from simclr_ray.errors import ClusterError

KNOCK_TIMEOUT_S = 10.0


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


def exposure(address: str) -> str:
    """What an open dashboard means, in a sentence."""
    return f"the dashboard at {address} asks for no token, so whoever reaches it can run any program on the cluster"
