"""How stores are reached: an endpoint and some limits, never a credential.

Each process resolves credentials by itself, so the settings may travel to every task of a cluster in plain sight: as
environment variables, which Ray hands to tasks and actors, and which other clients in those processes read too.
"""

from __future__ import annotations

import ipaddress
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from urllib.parse import urlsplit

from simclr_ray.errors import ConfigError

VARIABLE = "SIMCLR_RAY_STORAGE"
_FORWARDED = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)
"""What a driver's environment may say about its store besides credentials; it travels where no setting overrides it."""


@dataclass(frozen=True)
class StorageSettings:
    """Settings of a process's stores; None leaves a choice to the environment and the client."""

    endpoint: str | None = None
    """URL of an S3-compatible store; None takes AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or AWS itself."""
    region: str | None = None
    """Region that requests are signed for; None takes AWS_REGION, AWS_DEFAULT_REGION, the profile's, or us-east-1."""
    path_style: bool | None = None
    """Bucket in the URL's path (True) or in its host name (False); None: in the path where there is an endpoint."""
    anonymous: bool = False
    """Whether requests go unsigned, for public buckets."""
    allow_http: bool = False
    """Whether http:// and https:// URIs may be read."""
    deadline_s: float = 120.0
    """Longest time for one operation with all its retries, in seconds; bodies above 16 MiB get as much for each 16."""
    connect_timeout_s: float = 10.0
    """Longest wait for a connection, in seconds."""
    read_timeout_s: float = 30.0
    """Longest silence of the store in the middle of a request, in seconds."""

    def __post_init__(self) -> None:
        """Refuse an endpoint that cannot work.

        Raises:
            ConfigError: naming what is wrong with it, without showing a password.
        """
        if self.endpoint is not None and (problem := endpoint_problem(self.endpoint)):
            raise ConfigError(problem, where="storage.endpoint", expected="such as https://s3.example.org:9000")


def endpoint_problem(endpoint: str) -> str | None:
    """What is wrong with an endpoint, in words; None when nothing is."""
    try:
        parts = urlsplit(endpoint)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    if parts.username is not None or parts.password is not None:
        return "holds a user or a password; credentials come from the environment, a file or a role"
    if parts.scheme not in ("http", "https") or not host:
        return "is not an http or https URL"
    if parts.query or parts.fragment or parts.path.strip("/"):
        return "holds more than scheme, host and port"
    if is_link_local(host):
        return "is a link-local address, where machines keep their own secrets"
    return None


def is_link_local(host: str) -> bool:
    """Whether a host is an address such as 169.254.169.254, at which clouds give a machine's credentials."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_link_local


_lock = threading.Lock()
_current: StorageSettings | None = None
_generation = 0


def current() -> StorageSettings:
    """The settings of this process: those of `configure`, else those its environment carries, else the defaults."""
    global _current
    with _lock:
        if _current is None:
            _current = from_text(os.environ.get(VARIABLE, ""))
        return _current


def configure(settings: StorageSettings) -> None:
    """Set this process's stores, and its environment, so that what it starts and other S3 clients in it follow.

    An earlier call's changes to the environment are taken back first.
    """
    global _current, _generation
    with _lock:
        for name, value in _before.items():
            _put(name, value)
        own = _own(settings)
        _before.clear()
        _before.update({name: os.environ.get(name) for name in own})
        os.environ.update(own)
        _current = settings
        _generation += 1


def generation() -> int:
    """How often `configure` was called: clients of before are not used after it, for the environment may differ."""
    return _generation


_before: dict[str, str | None] = {}
"""What the environment held before `configure` changed it, so that the next one starts from there."""


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def environment(settings: StorageSettings, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that carry the settings to other processes, for Ray's `runtime_env`; none of them is a secret.

    Args:
        settings: What to carry.
        given: The environment of this process; what it says about endpoint and region travels too.
    """
    given = os.environ if given is None else given
    forwarded = {name: given[name] for name in _FORWARDED if given.get(name)}
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if name in forwarded and endpoint_problem(forwarded[name]):
            del forwarded[name]  # such as one with a password in it
    return forwarded | _own(settings)


def to_text(settings: StorageSettings) -> str:
    """Settings as JSON, without what is at its default."""
    values = asdict(settings)
    return json.dumps({one.name: values[one.name] for one in fields(settings) if values[one.name] != one.default})


def from_text(text: str) -> StorageSettings:
    """The inverse of `to_text`; an empty text gives the defaults.

    Raises:
        ConfigError: the text is no JSON object of these settings.
    """
    try:
        values = json.loads(text or "{}")
        if all(_fits(getattr(StorageSettings, name), value) for name, value in values.items()):
            return StorageSettings(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError, AttributeError):
        pass
    raise ConfigError(
        f"the environment variable {VARIABLE} cannot be read",
        expected="a JSON object with " + ", ".join(one.name for one in fields(StorageSettings)),
    )


def _fits(default: object, value: object) -> bool:
    """Whether a value has the type of a field with this default."""
    if default is None or isinstance(default, bool):
        return isinstance(value, str | bool if default is None else bool)
    return isinstance(value, float | int) and not isinstance(value, bool)


def _own(settings: StorageSettings) -> dict[str, str]:
    variables = {}
    if settings != StorageSettings():
        variables[VARIABLE] = to_text(settings)
    if settings.endpoint is not None:
        variables["AWS_ENDPOINT_URL_S3"] = settings.endpoint
    if settings.region is not None:  # botocore reads one name, other clients the other
        variables |= {"AWS_REGION": settings.region, "AWS_DEFAULT_REGION": settings.region}
    return variables
