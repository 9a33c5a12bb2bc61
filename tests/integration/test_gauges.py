"""Gauges at the real Prometheus endpoint of a local Ray: what panels and alerts ask for is there during a run."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from simclr_ray.data.manifest import Manifest
from simclr_ray.observe.gauges import instrument_names
from tests.conftest import ROOT
from tests.faults.commands import recipe, started, wait_for
from tests.servers.ray_head import RayHead, clean_environment, has_dashboard, ray_head
from tests.unit.observe.board import metrics_of, queries

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not has_dashboard(), reason="no metrics endpoint: ray[default] is not installed"),
]
ALL_METRICS = """
import select, sys, time, ray
from simclr_ray.observe.metrics import METRICS, Record, Recorder
from simclr_ray.train.gauges import ray_gauges
ray.init(address=sys.argv[1], log_to_driver=False)
recorder = Recorder([ray_gauges("s3://bucket/all")])
for step in (1, 2):
    recorder.log(Record(step, 64 * step, 1, time.time(), dict.fromkeys(METRICS, 0.5)))
print("logged", flush=True)
while not select.select([sys.stdin], [], [], 0.5)[0]:
    recorder.again()
"""
FORGETS_S = 2.0
"""Ray, of a gauge that is not set, where it reports every second as here."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with ray_head(tmp_path_factory.mktemp("head"), token=None) as head:
        yield head


def scraped(head: RayHead, run: str) -> dict[str, float]:
    """Values of the gauges of one run, as Prometheus would read them; none while the endpoint is not there yet."""
    try:
        text = urllib.request.urlopen(head.metrics, timeout=10).read().decode()
    except OSError:
        return {}
    found = re.findall(rf'^(\w+)\{{[^}}]*\brun="{run}"[^}}]*\}} (\S+)$', text, flags=re.MULTILINE)
    return {name: float(value) for name, value in found if "_simclr_" in name}


def test_every_metric_comes_out_under_its_name_with_the_runs_name(head: RayHead) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", ALL_METRICS, head.gcs], env=clean_environment() | dict(head.environment), cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert driver.stdout
        assert driver.stdout.readline() == "logged\n"
        wanted = {f"ray_{name}" for name in instrument_names()}
        wait_for(lambda: wanted <= set(scraped(head, "all")), timeout_s=60)
        values = scraped(head, "all")
        assert values["ray_simclr_train_loss"] == 0.5
        assert values["ray_simclr_step"] == 2
        assert values["ray_simclr_images_total"] == 64
        assert abs(values["ray_simclr_checkpoint_unix_s"] - time.time()) < 120
        time.sleep(3 * FORGETS_S)  # a run that stands still; nothing is logged any more
        assert set(scraped(head, "all")) == set(values)
    finally:
        driver.kill()
        driver.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_during_a_run_all_is_there_that_panels_and_alerts_ask_for(
    head: RayHead, data_set: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)
    file = recipe(tmp_path / "small", data_set, train__steps=600, cluster__address=head.gcs, evaluate__every=20)
    asked = set().union(*map(metrics_of, queries()))
    with started(file) as process:
        wait_for(lambda: asked <= set(scraped(head, "small")) or process.poll() is not None, timeout_s=240)
        values = scraped(head, "small")
        assert asked <= set(values), (asked - set(values), process.poll())
        assert values["ray_simclr_step"] >= 2
        assert values["ray_simclr_attempt"] == 1
        assert 0 < values["ray_simclr_train_loss"] < 10
        before = values["ray_simclr_step"]
        wait_for(lambda: scraped(head, "small").get("ray_simclr_step", 0) > before or process.poll() is not None)
