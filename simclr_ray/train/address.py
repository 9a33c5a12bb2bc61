"""Run in every worker process of a search before its first task, so it imports nothing but Ray: torch takes seconds."""

from __future__ import annotations

import os

import ray

HOOK = "simclr_ray.train.address.know_address"


def know_address() -> None:
    """Name the cluster this process belongs to, for libraries that look it up by themselves."""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
