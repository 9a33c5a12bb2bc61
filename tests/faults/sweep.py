"""A search on a Ray of its own, for what only that Ray can be asked afterwards; run as a program.

    python -m tests.faults.sweep CONFIG SPACE FOLDER CPUS

Prints what the console says, and then one JSON line: the placement groups that Ray Train made and that are not gone.
"""

from __future__ import annotations

import json
import logging
import sys
import time

import ray
from ray.util import placement_group_table

from simclr_ray.errors import SimclrError
from simclr_ray.search.tune import tune
from simclr_ray.train.address import HOOK

GONE_WITHIN_S = 60.0


def left_over() -> list[dict[str, object]]:
    """Placement groups that still exist."""
    return [one for one in placement_group_table().values() if one["state"] != "REMOVED"]


def main(config: str, space: str, folder: str, cpus: int) -> None:
    """Search, then look what is left."""
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR,
        runtime_env={"worker_process_setup_hook": HOOK},
    )  # fmt: skip
    failed = None
    try:
        tune(config, space, folder)
    except SimclrError as error:
        failed = str(error)
    end = time.monotonic() + GONE_WITHIN_S
    while left_over() and time.monotonic() < end:
        time.sleep(0.5)
    made = len(placement_group_table())
    names = [(one["name"], one["state"], one["bundles"]) for one in left_over()]
    free = ray.available_resources().get("CPU")
    print(json.dumps({"failed": failed, "made": made, "left": names, "free_cpus": free}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
