"""Whole runs with data and run folder on a real S3 server, through a proxy that makes it fail."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import storage
from simclr_ray.data.manifest import Manifest
from simclr_ray.observe.metrics import Record, read_jsonl
from simclr_ray.train.checkpoint import committed_steps
from tests.faults import commands
from tests.faults.commands import STEPS, recipe, started, wait_for
from tests.servers import seaweed
from tests.servers.proxy import Fault, Proxy

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def proxy(s3: seaweed.Seaweed) -> Iterator[Proxy]:
    with Proxy(s3.endpoint) as one:
        yield one


def on_s3(folder: str, data_set: Manifest, scratch: Path, proxy: Proxy, **changes: Any) -> Path:
    """A recipe with everything on the bucket, reached through the proxy with little patience."""
    for file in sorted(Path(data_set.folder).iterdir()):
        storage.write_bytes(f"{folder}/data/{file.name}", file.read_bytes())
    return recipe(
        scratch / "run", data_set, data__train=f"{folder}/data", run__folder=f"{folder}/run",
        storage__endpoint=proxy.endpoint, storage__deadline_s=8, storage__read_timeout_s=3, **changes,
    )  # fmt: skip


def records(folder: str, scratch: Path) -> list[Record]:
    copy = scratch / "metrics.jsonl"
    copy.write_bytes(storage.read_bytes(f"{folder}/run/metrics.jsonl"))
    return read_jsonl(copy)


def committed(folder: str) -> list[int]:
    return committed_steps(f"{folder}/run/checkpoints")


@pytest.fixture(scope="module")
def undisturbed(data_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("twin") / "run"
    code, output = commands.run(recipe(folder, data_set))
    assert code == 0, output
    return commands.losses(folder)


def test_row_25_saves_that_fail_are_passed_over_and_the_losses_are_the_same(
    undisturbed: dict[int, float], data_set: Manifest, s3_folder: str, proxy: Proxy, tmp_path: Path
) -> None:
    """The first checkpoint's tensors are refused for longer than a save is tried; the next interval's are not."""
    file = on_s3(s3_folder, data_set, tmp_path, proxy)
    proxy.fault(Fault("status", times=-1, method="PUT", path="step-000000010/model"))
    code, output = commands.run(file)
    assert code == 0, output
    assert "checkpoint not saved" in output
    assert committed(s3_folder)[-1] == STEPS
    assert 10 not in committed(s3_folder)
    assert {r.step: r.values["train/loss"] for r in records(s3_folder, tmp_path)} == undisturbed


@pytest.mark.parametrize("code", ["SlowDown", "ExpiredToken"])
def test_rows_22_and_23_images_that_cannot_be_read_for_good_end_with_a_checkpoint_and_exit_4(
    data_set: Manifest, s3_folder: str, proxy: Proxy, tmp_path: Path, code: str
) -> None:
    """The shards are refused, the run folder is not: what was learned so far is kept."""
    file = on_s3(
        s3_folder, data_set, tmp_path, proxy,
        train__steps=100_000, optim__warmup_epochs=10, train__checkpoint_every=100_000, train__checkpoint_every_s=None,
        cluster__max_failures=0, data__steps_ahead=1, data__prefetch_units=1,
    )  # fmt: skip
    status = 503 if code == "SlowDown" else 400
    with started(file) as process:
        wait_for(lambda: bool(proxy.requests("shard-00000.parquet")), timeout_s=90)
        wait_for(lambda: storage.exists(f"{s3_folder}/run/run.json"))
        os.set_blocking(process.stdout.fileno(), True)  # type: ignore[union-attr]
        for line in process.stdout or ():
            if line.startswith("step "):
                break
        proxy.fault(Fault("status", times=-1, method="GET", path="/data/shard", status=status, code=code))
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 4, output
    saved = re.search(r"the state after step (\d+) was saved", output)
    assert saved, output
    assert committed(s3_folder) == [int(saved[1])]
    assert ("expired" in output.lower()) == (code == "ExpiredToken"), output
    assert seaweed.SECRET_KEY not in output


def test_row_22_a_storm_that_passes_is_seen_in_the_wait_and_costs_no_digit(
    undisturbed: dict[int, float], data_set: Manifest, s3_folder: str, proxy: Proxy, tmp_path: Path
) -> None:
    file = on_s3(s3_folder, data_set, tmp_path, proxy, data__steps_ahead=1, data__prefetch_units=1)
    proxy.fault(Fault("status", times=40, method="GET", path="/data/shard"))
    code, output = commands.run(file)
    assert code == 0, output
    found = records(s3_folder, tmp_path)
    assert {r.step: r.values["train/loss"] for r in found} == undisturbed
    assert max(r.values["data/wait_s"] for r in found) > 0.5
