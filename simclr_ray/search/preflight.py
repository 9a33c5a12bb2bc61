"""What must be true of a cluster before trials start on it."""

from __future__ import annotations

import importlib
import os

import ray
import ray.exceptions

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError, ConfigError, first_line

TIMEOUT_S = 60.0
DASHBOARD = (
    "Ray Train needs the State API to give back the placement group of a trial that was killed; without it the sweep "
    "would wait for ever for that room"
)


def require_dashboard(config: ClusterConfig) -> None:
    """Refuse to start a local Ray that could have no dashboard.

    Raises:
        ConfigError: packages of Ray's dashboard are missing.
    """
    if ray.is_initialized() or config.address or os.environ.get("RAY_ADDRESS"):
        return  # a cluster that somebody else started is asked
    try:
        importlib.import_module("ray.dashboard.optional_deps")
    except ImportError as error:
        raise ConfigError(
            f"a search needs Ray's dashboard, which is not installed ({error}): {DASHBOARD}",
            fix="pip install 'simclr-ray[dashboard]'",
        ) from None


def require_state_api() -> None:
    """Ask the State API from a task, where Ray Train's cleaner will ask it too.

    Raises:
        ClusterError: it does not answer.
    """
    ask = ray.remote(num_cpus=0)(_ask_state_api)
    try:
        problem = ray.get(ask.remote(), timeout=TIMEOUT_S)
    except ray.exceptions.RayError as error:
        problem = first_line(error)
    if problem is not None:
        raise ClusterError(
            f"Ray's State API does not answer on this cluster: {problem}; {DASHBOARD}",
            fix="start Ray with its dashboard (pip install 'ray[default]'; ray start --head --include-dashboard=true), "
            "on a port that no other Ray of the machine has, and set RAY_ADDRESS where several run on it",
        )


def _ask_state_api() -> str | None:
    """What goes wrong, in a line."""
    from ray.util.state import list_actors

    try:
        list_actors(limit=1, timeout=30)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
    return None
