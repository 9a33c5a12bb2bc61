"""S3 clients: one for each process and settings, shared by its threads, with nothing going on behind our back.

botocore resolves the usual chain of credentials (environment, files, web identity, container and instance roles) and
renews what expires. Its own retries and its following of redirects to other regions are off: the first would be a
second layer under ours, the second would read across regions without a word.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import botocore.config
import botocore.session
from botocore import UNSIGNED
from botocore.credentials import CredentialResolver

from simclr_ray.storage import settings as settings_
from simclr_ray.storage.counting import METER
from simclr_ray.storage.redaction import redact
from simclr_ray.storage.settings import StorageSettings
from simclr_ray.storage.uris import tellable

POOL = 64
"""Connections kept for reuse; more threads than that wait for none, but open new ones."""


@dataclass(frozen=True)
class Client:
    """A botocore client, and words about it for messages."""

    api: Any
    place: str
    """Endpoint, without a password that it may hold, and region."""
    origin: str
    """Which link of the chain gave the credentials; never the credentials."""


_lock = threading.Lock()
_clients: dict[tuple[int, int, StorageSettings], Client] = {}
_found_at: int | None = None
"""Generation of the settings at which this process found credentials."""

METADATA = {"metadata_service_timeout": 2, "metadata_service_num_attempts": 5}
"""Seconds and attempts for the services that give roles their credentials, at least. botocore asks once, for one
second; but where thousands of processes start together, their machine's service does not answer all of them at once."""

NONE = "none"
ORIGINS = {
    "env": "the environment",
    "shared-credentials-file": "the shared credentials file",
    "config-file": "the AWS config file",
    "custom-process": "the profile's credential process",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "a role by web identity",
    "sso": "single sign-on",
    "container-role": "the container's role",
    "iam-role": "the machine's role",
}
CHAIN = (
    "AWS_ACCESS_KEY_ID in the environment, the shared credentials and config files, web identity, "
    "the container's role and the machine's role"
)


def client(settings: StorageSettings) -> Client:
    """This process's client for the settings."""
    key = (os.getpid(), settings_.generation(), settings)
    with _lock:
        if key not in _clients:
            _clients.clear()  # those of before a fork or of other settings
            _clients[key] = _build(settings)
        return _clients[key]


def had_credentials() -> bool:
    """Whether this process found credentials before under these settings, so that finding none is likely to pass."""
    return _found_at == settings_.generation()


def renew(stale: Client) -> None:
    """Forget a client whose token the store calls expired: the next one goes through the whole chain again."""
    with _lock:
        for key in [key for key, value in _clients.items() if value is stale]:
            del _clients[key]


def _build(settings: StorageSettings) -> Client:
    global _found_at
    session = botocore.session.Session()
    for name, least in METADATA.items():
        session.set_config_variable(name, max(least, session.get_config_variable(name)))
    region = settings.region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    style = {None: "auto", True: "path", False: "virtual"}[settings.path_style]
    config = botocore.config.Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        max_pool_connections=POOL,
        tcp_keepalive=True,
        s3={"addressing_style": style},
        user_agent_extra="simclr-ray",
        signature_version=UNSIGNED if settings.anonymous else None,
    )
    origin = _origin(session, settings)
    if not origin.startswith(NONE):
        _found_at = settings_.generation()
    made = session.create_client("s3", region_name=region, endpoint_url=settings.endpoint, config=config)
    made.meta.events.register("before-call.s3", _stay_in_region)
    made.meta.events.register("before-send.s3", _count)
    return Client(made, redact(f"{tellable(made.meta.endpoint_url)}, region {region}"), origin)


def _origin(session: Any, settings: StorageSettings) -> str:
    if settings.anonymous:
        return f"{NONE}: requests go unsigned (storage.anonymous)"
    credentials = session.get_credentials()
    if credentials is None:  # an answer that took long; the client, which asks again, is given it at once
        session.register_component("credential_provider", CredentialResolver(providers=[]))
        return NONE
    return ORIGINS.get(credentials.method, str(credentials.method))


def _stay_in_region(context: dict[str, Any], **_: Any) -> None:
    """Tell botocore's redirector that it has done its work, so that a wrong region is an error for us to explain."""
    context.setdefault("s3_redirect", {})["redirected"] = True


def _count(**_: Any) -> None:
    METER.request()
