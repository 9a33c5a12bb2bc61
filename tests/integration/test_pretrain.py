"""Whole trainings on a real local Ray: the same curve for 1, 2, 3 and 4 workers, and after kills."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from PIL import Image

from simclr_ray import load_encoder
from simclr_ray.config import Config
from simclr_ray.configure import load_config, to_yaml
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.quarantine import Entry
from simclr_ray.data.shards import ImageRow
from simclr_ray.errors import ConfigError, DataError, NumericsError
from simclr_ray.observe.metrics import read_jsonl
from simclr_ray.train.checkpoint import committed_steps, load
from simclr_ray.train.pretrain import Origin, pretrain
from simclr_ray.train.run import RunFolder, read_quarantine
from simclr_ray.views.make import maker
from tests.conftest import make_data_set, real_rows, small_run

pytestmark = pytest.mark.integration

STEPS = 60


def settings(folder: Path, manifest: Manifest, **changes: Any) -> Config:
    return small_run(folder, manifest, **({"train__steps": STEPS, "train__checkpoint_every": 4} | changes))


def losses(folder: Path) -> list[float]:
    records = read_jsonl(folder / "metrics.jsonl")
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    return [record.values["train/loss"] for record in records]


def assert_same_curve(folder: Path, other: Path) -> None:
    """Rounding differs between world sizes and grows with the steps; another sample anywhere would show at once."""
    assert losses(folder)[:10] == pytest.approx(losses(other)[:10], rel=1e-5)
    assert losses(folder) == pytest.approx(losses(other), rel=1e-3)


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, data_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to: one worker."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    result = pretrain(settings(folder, data_set))
    assert result.steps == STEPS
    return folder


def test_a_run_leaves_its_folder(undisturbed: Path) -> None:
    assert len(losses(undisturbed)) == STEPS
    kept = committed_steps(str(undisturbed / "checkpoints"))
    assert kept[-1] == STEPS
    assert len(kept) == 3
    assert not any(step % 4 for step in kept)  # a busy machine may pass one over
    info = json.loads((undisturbed / "run.json").read_text())
    assert (info["status"], info["attempts"]) == ("finished", 1)
    assert info["views"] == {"maker": maker(), "where": "cpu"}
    assert (undisturbed / "resolved.yaml").exists()
    assert load_encoder(str(undisturbed)).step == STEPS
    facts = load(str(undisturbed / "checkpoints"), STEPS).facts
    assert (facts["rejected_total"], facts["animated_total"]) == (0, 0)
    assert load_encoder(str(undisturbed), step=kept[-2]).step == kept[-2]


def test_a_finished_run_is_left_alone(undisturbed: Path, data_set: Manifest) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert pretrain(settings(undisturbed, data_set)).steps == STEPS
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def three_workers(undisturbed: Path, data_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "three"
    pretrain(settings(folder, data_set, cluster__workers=3))
    return folder


def test_the_loss_curve_does_not_depend_on_the_number_of_workers(
    undisturbed: Path, three_workers: Path, data_set: Manifest, tmp_path: Path
) -> None:
    pretrain(settings(tmp_path / "two", data_set, cluster__workers=2))
    assert_same_curve(tmp_path / "two", undisturbed)
    assert_same_curve(three_workers, undisturbed)


@pytest.mark.slow
def test_four_workers_give_the_same_curve(undisturbed: Path, data_set: Manifest, tmp_path: Path) -> None:
    pretrain(settings(tmp_path / "four", data_set, cluster__workers=4))
    assert_same_curve(tmp_path / "four", undisturbed)


@pytest.mark.slow
def test_a_killed_worker_costs_a_restart_and_nothing_else(
    data_set: Manifest, three_workers: Path, tmp_path: Path
) -> None:
    """With three workers, which do not divide the four units of a step: each rank gets its own units again."""
    folder = tmp_path / "run"
    killer = threading.Thread(
        target=when(lambda: bool(committed_steps(str(folder / "checkpoints"))), kill_train_worker)
    )
    killer.start()
    pretrain(settings(folder, data_set, cluster__workers=3))
    killer.join()
    # Not bit for bit from three workers on: DistributedDataParallel lays out its buckets anew after the first step of
    # an attempt, and with them the order in which gloo sums three gradients.
    assert_same_curve(folder, three_workers)
    assert json.loads((folder / "run.json").read_text())["attempts"] == 2


@pytest.mark.slow
def test_a_killed_cluster_is_continued_by_the_same_command(
    undisturbed: Path, data_set: Manifest, tmp_path: Path
) -> None:
    """SIGKILL to the driver takes its local Ray along; the second command ends with the same losses, bit for bit."""
    folder, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(to_yaml(settings(folder, data_set).model_dump(mode="json")))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "simclr_ray.cli", "pretrain", str(file)]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    when(lambda: bool(committed_steps(str(folder / "checkpoints"))), first.kill)()
    assert first.wait() == -signal.SIGKILL
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert second.returncode == 0, second.stderr
    assert "continuing from the checkpoint of step" in second.stdout
    assert losses(folder) == losses(undisturbed)


@pytest.mark.slow
def test_colours_by_the_train_workers_give_the_same_curve_also_after_a_kill(
    undisturbed: Path, data_set: Manifest, tmp_path: Path
) -> None:
    """Who makes the colours changes a value here and there by one level, and nothing else."""
    folder = tmp_path / "run"
    killer = threading.Thread(
        target=when(lambda: bool(committed_steps(str(folder / "checkpoints"))), kill_train_worker)
    )
    killer.start()
    pretrain(settings(folder, data_set, cluster__workers=2, views__where="gpu"))
    killer.join()
    assert_same_curve(folder, undisturbed)
    assert json.loads((folder / "run.json").read_text())["attempts"] == 2


@pytest.mark.slow
def test_micro_batches_and_frozen_batch_norm_do_not_depend_on_the_number_of_workers(
    local_ray: None, data_set: Manifest, tmp_path: Path
) -> None:
    """Two of a step's four units at a time; the first batch calibrates batch norm on all ranks together."""
    curves = []
    for workers in (1, 2):
        changes = {"cluster__workers": workers, "train__micro_batch": 32, "train__steps": 6}
        config = settings(tmp_path / str(workers), data_set, **changes, model__batch_norm="frozen")
        pretrain(load_config(config, ["optim.warmup_epochs=0.1"]))
        curves.append([r.values["train/loss"] for r in read_jsonl(tmp_path / str(workers) / "metrics.jsonl")])
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    statistics = load_encoder(str(tmp_path / "2")).model.state_dict()
    tracked = [int(value) for name, value in statistics.items() if name.endswith("num_batches_tracked")]
    assert tracked
    assert set(tracked) == {2}  # the two micro-batches of the first step, and nothing since


def test_a_run_of_another_configuration_is_refused_field_by_field(undisturbed: Path, data_set: Manifest) -> None:
    with pytest.raises(ConfigError) as caught:
        pretrain(settings(undisturbed, data_set, run__seed=4, optim__weight_decay=0.5))
    assert "run.seed: the run has 3, now 4" in str(caught.value)
    assert "optim.weight_decay" in str(caught.value)


def test_too_many_broken_images_stop_the_run_and_are_listed(local_ray: None, tmp_path: Path) -> None:
    """A fifth of the images is broken; another fifth has two frames, which are no fault, and are counted."""
    changed = {0: lambda image: b"", 1: two_frames}
    rows = [ImageRow(changed.get(i % 5, bytes)(row.image), row.label, row.uri) for i, row in enumerate(real_rows(400))]
    folder = tmp_path / "run"
    with pytest.raises(DataError, match="could not be used") as caught:
        pretrain(settings(folder, make_data_set(tmp_path / "data", rows)))
    assert re.search(r"\d+ empty \(fashion-mnist/train/\d+\.png, fashion-mnist/", str(caught.value))
    table = read_quarantine(RunFolder(str(folder)))
    assert table is not None
    listed = [Entry(**row) for row in table.to_pylist()]
    assert {entry.reason for entry in listed} == {"empty"}
    assert all(entry.sample_id % 5 == 0 for entry in listed)
    assert all(entry.uri == rows[entry.sample_id].uri for entry in listed if entry.detail)
    assert {entry.detail for entry in listed[:10]} == {"0 bytes"}
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    last = read_jsonl(folder / "metrics.jsonl")[-1]
    assert last.values["data/rejected_total"] / last.samples_seen == pytest.approx(1 / 5, abs=0.1)  # of a step
    # A fourth of the images that stand in for broken ones is animated, too.
    assert last.values["data/animated_total"] / last.samples_seen == pytest.approx(1 / 5 + 1 / 20, abs=0.02)


def two_frames(image: bytes) -> bytes:
    with Image.open(io.BytesIO(image)) as first:
        stream = io.BytesIO()
        first.convert("L").save(stream, "GIF", save_all=True, append_images=[Image.new("L", first.size)])
    return stream.getvalue()


@pytest.mark.slow
def test_a_diverged_run_stops_before_its_weights_are_saved(local_ray: None, data_set: Manifest, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="diverged"):
        pretrain(settings(tmp_path / "run", data_set, optim__base_learning_rate=1e38, optim__name="adamw"))
    assert committed_steps(str(tmp_path / "run" / "checkpoints")) == []


@pytest.mark.slow
def test_a_run_that_begins_from_anothers_checkpoint_takes_its_weights_and_its_place_in_the_data(
    undisturbed: Path, data_set: Manifest, tmp_path: Path
) -> None:
    """By the same settings it is the same curve from there on; its own checkpoints count once it has some."""
    whole = [record.values["train/loss"] for record in read_jsonl(undisturbed / "metrics.jsonl")]
    step = committed_steps(str(undisturbed / "checkpoints"))[0]
    origin = Origin(str(undisturbed), step)
    pretrain(settings(tmp_path / "run", data_set), origin=origin)
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record.step for record in records] == list(range(step + 1, STEPS + 1))
    assert [record.values["train/loss"] for record in records] == whole[step:]
    again = pretrain(settings(tmp_path / "run", data_set), origin=Origin(str(tmp_path / "gone"), 1))
    assert again.metrics == {}  # finished: where it began is not looked at any more


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_can_go_on(local_ray: None, data_set: Manifest, tmp_path: Path) -> None:
    folder, stop = tmp_path / "run", threading.Event()
    thread = threading.Thread(target=when(lambda: (folder / "metrics.jsonl").exists(), stop.set))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(folder, data_set, train__checkpoint_every=10_000, train__steps=20_000), stop=stop)
    thread.join()
    steps = [record.step for record in read_jsonl(folder / "metrics.jsonl")]
    assert committed_steps(str(folder / "checkpoints")) == [steps[-1]]
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


def when(condition: Callable[[], bool], act: Callable[[], None], timeout_s: float = 120.0) -> Callable[[], None]:
    """A fault that is scheduled by what has happened, not by luck."""

    def run() -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "the moment for the fault never came"
            time.sleep(0.02)
        act()

    return run


def kill_train_worker() -> None:
    """SIGKILL to a Ray Train worker of this test's own Ray, by its process id."""
    kill_worker("RayTrainWorker")


def kill_worker(name: str) -> None:
    """The same for an actor of any name."""
    ours = ray._private.worker.global_worker.node.get_session_dir_path()
    for process in psutil.process_iter(["cmdline"]):
        ancestors = [part for parent in process.parents() for part in parent.cmdline()]
        is_worker = name in " ".join(process.info["cmdline"] or [])
        if is_worker and any(ours in part for part in ancestors):
            process.kill()
            return
    raise AssertionError(f"no {name} found")
