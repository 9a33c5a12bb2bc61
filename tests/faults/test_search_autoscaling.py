"""A search on a cluster that has no room at first: trials ask for it by their placement groups, and it goes again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_ray.data.manifest import Manifest
from simclr_ray.search.record import read_records
from tests.faults.commands import wait_for
from tests.faults.growing import NodeType, alive_nodes, growing_cluster, watched
from tests.faults.test_search_faults import files, grid, tune_command

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_the_cluster_grows_for_trials_and_shrinks_when_they_are_done(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    with growing_cluster(tmp_path, {"worker": NodeType(nodes=2, cpus=2)}) as address:
        changes = {"cluster__address": address, "cluster__start_timeout_s": 300.0, "optim__warmup_epochs": 1}
        asked = grid(0.1, 0.5) | {"max_concurrent": 2}
        config, space = files(folder, data_set, asked, train__steps=40, **changes)
        space.write_text(space.read_text().replace("every: 5", "every: 20"))
        assert alive_nodes(address) == 1
        with watched(lambda: alive_nodes(address), every_s=1.0) as seen:
            process = subprocess.run(
                [sys.executable, *map(str, tune_command(config, space, folder))], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=1200, check=False,
            )  # fmt: skip
        assert process.returncode == 0, process.stdout
        records = read_records(str(folder / "trials"))
        assert [one.status for one in records] == ["finished", "finished"], process.stdout
        assert "side by side: 2" in process.stdout
        assert max(seen) == 3, seen  # the head has no CPU, and two trials and their streams do not fit one node
        began = time.monotonic()
        wait_for(lambda: alive_nodes(address) == 1, timeout_s=90)
        print(f"back to the head after {time.monotonic() - began:.0f} s")  # noqa: T201
