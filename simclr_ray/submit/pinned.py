"""The versions that a job insists on: what its configuration was checked with, where it was submitted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from simclr_ray.errors import ClusterError
from simclr_ray.version import PINNED


def refuse_unpinned() -> None:
    """In a job, compare this machine's versions with the submitter's; elsewhere do nothing.

    Raises:
        ClusterError: some differ.
    """
    text = os.environ.get(PINNED)
    if not text:
        return
    from simclr_ray.train.cluster import versions

    lines = differing(json.loads(text), versions())
    if lines:
        raise ClusterError(
            "the cluster has other versions than the machine that submitted this job:\n"
            + "\n".join(f"  {line}" for line in lines),
            fix="use one image or environment for both, or submit with --any-versions",
        )


def differing(wanted: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """A line for each package of another version; builds of one version (torch 2.14.1+cpu, +cu130) are the same."""
    return [
        f"{name}: {version} there, {here.get(name)} here"
        for name, version in wanted.items()
        if here.get(name, "").partition("+")[0] != version.partition("+")[0]
    ]
