"""Faults of processes: killed, hung and interrupted ones, and numbers that are not finite.

Each is compared with the undisturbed twin of the same seed. Faults of whole nodes are in test_node_faults.py.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from simclr_ray.data.manifest import Manifest
from simclr_ray.train.run import RunFolder, read_quarantine
from tests.faults import commands
from tests.faults.commands import (
    STEPS,
    committed,
    losses,
    processes,
    recipe,
    started,
    steps_done,
    train_workers,
    wait_for,
)
from tests.servers.seaweed import free_port

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def twin(folder: Path, data_set: Manifest, workers: int) -> dict[int, float]:
    """Losses of the run that nothing happens to."""
    code, output = commands.run(recipe(folder, data_set, cluster__workers=workers))
    assert code == 0, output
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    return losses(folder)


@pytest.fixture(scope="module")
def undisturbed(data_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return twin(tmp_path_factory.mktemp("twin") / "run", data_set, 1)


@pytest.fixture(scope="module")
def undisturbed_two(data_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return twin(tmp_path_factory.mktemp("twin") / "run", data_set, 2)


def info(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "run.json").read_text()))


@pytest.mark.parametrize("after", [1, 15])
def test_row_34_a_killed_worker_costs_a_restart_and_no_digit(
    undisturbed: dict[int, float], data_set: Manifest, tmp_path: Path, after: int
) -> None:
    """Before the first checkpoint, where it begins again, and in the middle."""
    folder = tmp_path / "run"
    with started(recipe(folder, data_set)) as process:
        wait_for(lambda: steps_done(folder) >= after)
        train_workers(process)[0].kill()
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert losses(folder) == undisturbed
    assert info(folder)["attempts"] == 2
    assert "attempt 2; the one before ended" in output


@pytest.mark.parametrize("moment", ["die rank=1 step=12", "die rank=0 step=17", "die_saving rank=0 step=20"])
def test_row_34_a_worker_killed_between_two_collectives_or_in_a_save_costs_no_digit(
    undisturbed_two: dict[int, float], data_set: Manifest, tmp_path: Path, moment: str
) -> None:
    """The other rank waits in a collective; or the checkpoint under way has one file of two."""
    folder = tmp_path / "run"
    file = recipe(folder, data_set, cluster__workers=2, cluster__collective_timeout_s=8)
    code, output = commands.run(file, fault=f"{moment} once={tmp_path / 'died'}")
    assert code == 0, output
    assert (tmp_path / "died").exists()
    assert losses(folder) == undisturbed_two
    assert info(folder)["attempts"] == 2


def test_row_38_ctrl_c_saves_and_ends_and_the_same_command_goes_on(
    undisturbed: dict[int, float], data_set: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    file = recipe(folder, data_set, train__checkpoint_every=1000)
    with started(file) as process:
        wait_for(lambda: steps_done(folder) >= 5)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "stopping after a last checkpoint" in output
    assert info(folder)["status"] == "interrupted"
    assert len(committed(folder)) == 1
    assert committed(folder)[0] == steps_done(folder)
    assert f"to continue from the checkpoint of step {steps_done(folder)}" in output
    assert not (folder / "lock.json").exists()
    code, output = commands.run(file)
    assert code == 0, output
    assert losses(folder) == undisturbed


def test_row_38_ctrl_c_while_no_worker_lives_ends_without_another_attempt(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(recipe(folder, data_set, train__steps=100_000, optim__warmup_epochs=10)) as process:
        wait_for(lambda: steps_done(folder) >= 12)
        train_workers(process)[0].kill()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert info(folder)["attempts"] == 1
    assert info(folder)["status"] == "interrupted"


def test_row_38_a_second_ctrl_c_ends_at_once_and_so_does_sigterm_twice(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(recipe(folder, data_set, train__steps=100_000, optim__warmup_epochs=10)) as process:
        wait_for(lambda: steps_done(folder) >= 2)
        workers = train_workers(process)
        for worker in workers:
            worker.suspend()  # so that the last checkpoint never comes
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert info(folder)["status"] == "interrupted"
    wait_for(lambda: not any(worker.is_running() for worker in workers), timeout_s=30)


def test_row_37_a_rank_that_hangs_is_named_and_restarted(
    undisturbed: dict[int, float], data_set: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    file = recipe(folder, data_set, cluster__workers=2, cluster__collective_timeout_s=8)
    started_at = time.monotonic()
    code, output = commands.run(file, fault=f"hang rank=1 step=12 once={tmp_path / 'hung'}")
    assert code == 0, output
    assert time.monotonic() - started_at < 200
    assert "waited for rank 1 at step 12 in compute" in output or "last heard of rank 1 at step 12" in output, output
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-3)
    assert info(folder)["attempts"] == 2


def test_row_40_a_nan_on_one_rank_reaches_no_weights_and_names_its_image(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = recipe(folder, data_set, cluster__workers=2)
    code, output = commands.run(file, fault="nan rank=1 step=12")
    assert code == 6, output
    assert "step 12" in output
    assert "sample ids" in output
    listed = read_quarantine(RunFolder(str(folder)))
    assert listed is not None
    (entry,) = listed.to_pylist()
    assert (entry["reason"], entry["step"]) == ("not_finite", 12)
    assert entry["uri"].startswith("fashion-mnist/")
    assert committed(folder)[-1] <= 12


def test_row_40_rollback_leaves_that_step_out_and_goes_on(
    undisturbed: dict[int, float], data_set: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    file = recipe(folder, data_set, train__on_nonfinite="rollback")
    code, output = commands.run(file, fault="nan rank=0 step=12")
    assert code == 0, output
    assert "its images are left out (1 of 3 such steps)" in output
    assert info(folder)["left_out"] == [12]
    found = losses(folder)
    assert sorted(found) == [step for step in range(1, STEPS + 1) if step != 13]  # step 12, counted from 0
    assert {step: found[step] for step in range(1, 13)} == {step: undisturbed[step] for step in range(1, 13)}
    assert found[STEPS] != undisturbed[STEPS]


def test_row_39_a_gpu_without_memory_ends_the_run_with_what_would_fit_and_is_not_tried_again(
    data_set: Manifest, tmp_path: Path
) -> None:
    """Torch's error, injected: there is no GPU here."""
    folder = tmp_path / "run"
    code, output = commands.run(recipe(folder, data_set, cluster__workers=2), fault="oom rank=1 step=12")
    assert code == 2, output
    assert "out of memory on rank 1 at step 12" in output
    assert "cluster.workers=4 (the run goes on from its newest checkpoint" in output
    assert "train.micro_batch=32" in output
    assert info(folder)["attempts"] == 1


def test_row_44_the_second_of_two_commands_is_refused_and_the_first_goes_on(
    undisturbed: dict[int, float], data_set: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    file = recipe(folder, data_set)
    with started(file) as process:
        wait_for(lambda: steps_done(folder) >= 2)
        code, refused = commands.run(file)
        output, _ = process.communicate(timeout=240)
    assert code == 2
    assert f"process {process.pid} on" in refused
    assert "last heartbeat" in refused
    assert process.returncode == 0, output
    assert losses(folder) == undisturbed


def test_row_30_harmless_changes_are_listed_and_fresh_starts_again(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert commands.run(recipe(folder, data_set, train__steps=4, optim__warmup_epochs=0.1))[0] == 0
    file = recipe(folder, data_set, train__steps=4, optim__warmup_epochs=0.1, train__log_every=2)
    code, output = commands.run(file)
    assert code == 0
    assert "train.log_every 1 -> 2" in output
    other = recipe(folder, data_set, train__steps=6, optim__warmup_epochs=0.1, loss__temperature=0.3)
    code, output = commands.run(other)
    assert code == 2
    assert "loss.temperature: the run has 0.5, now 0.3" in output
    assert "--fresh" in output
    code, output = commands.run(other, "--fresh")
    assert code == 0, output
    assert sorted(losses(folder)) == list(range(1, 7))


def test_row_29_a_run_goes_on_with_another_number_of_workers(
    undisturbed: dict[int, float], data_set: Manifest, tmp_path: Path
) -> None:
    """Begun by two, continued by three, which do not divide the four units of a step."""
    folder = tmp_path / "run"
    with started(recipe(folder, data_set, cluster__workers=2)) as process:
        wait_for(lambda: bool(committed(folder)))
        process.kill()
        process.communicate()
    code, output = commands.run(recipe(folder, data_set, cluster__workers=3))
    assert code == 0, output
    assert "cluster.workers 2 -> 3" in output
    assert "continuing from the checkpoint of step" in output
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-3)


@pytest.mark.parametrize("actor", ["Desk", "TrainController"])
def test_a_lost_actor_of_the_driver_ends_with_a_sentence_and_the_same_command_goes_on(
    undisturbed: dict[int, float], data_set: Manifest, tmp_path: Path, actor: str
) -> None:
    folder = tmp_path / "run"
    file = recipe(folder, data_set)
    with started(file) as process:
        wait_for(lambda: steps_done(folder) >= 5)
        (one,) = processes(process, actor)
        one.kill()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 5, output
    assert "Traceback" not in output
    assert "run the same command again" in output
    if actor == "TrainController":  # the desk takes with it what would tell why the rest ended
        step = max(committed(folder), default=None)
        whence = "the beginning" if step is None else f"the checkpoint of step {step}"
        assert f"to continue from {whence}" in output
    code, output = commands.run(file)
    assert code == 0, output
    assert losses(folder) == undisturbed


def test_another_ray_on_the_machine_takes_no_workers_away(data_set: Manifest, tmp_path: Path) -> None:
    """Ray's cleaner of placement groups would ask that one whether our run lives, and hear that it does not."""
    other = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    )
    try:
        file = recipe(tmp_path / "run", data_set, train__steps=400, optim__warmup_epochs=1)
        code, output = commands.run(file)
    finally:
        other.shutdown()
    assert code == 0, output
    assert info(tmp_path / "run")["attempts"] == 1, output


def test_row_42_workers_that_cannot_be_had_are_waited_for_with_words_and_then_exit_5(
    data_set: Manifest, tmp_path: Path
) -> None:
    """Asked of a running cluster, which might grow, and does not."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        file = recipe(
            tmp_path / "run", data_set, cluster__workers=4, cluster__address=cluster.address,
            cluster__start_timeout_s=15, cluster__max_failures=0,
        )  # fmt: skip
        code, output = commands.run(file)
    finally:
        cluster.shutdown()
    assert code == 5, output
    assert "waiting for 4 workers of 1 CPU each for 3" in output
    assert "of 2 CPUs free" in output
