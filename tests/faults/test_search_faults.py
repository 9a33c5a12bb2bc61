"""Searches whose trials crash, hang, diverge or are ended, and searches that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import storage
from simclr_ray.configure import load_config, to_yaml
from simclr_ray.data.manifest import Manifest
from simclr_ray.observe.metrics import read_jsonl
from simclr_ray.search.record import TrialRecord, read_record, read_records
from simclr_ray.train.checkpoint import committed_steps
from tests.conftest import small_run
from tests.faults import commands
from tests.faults.commands import injected, program, wait_for
from tests.servers.seaweed import Seaweed

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

INJECT = Path(__file__).parent / "inject_search"
PROBE = {"images": 32, "voters": 64, "views": 2}


def files(folder: Path, manifest: Manifest, space: dict[str, Any], **changes: Any) -> tuple[Path, Path]:
    """A configuration and a space beside the folder of a search."""
    values = {"train__steps": 10, "cluster__workers": 1, "evaluate__train": manifest.folder} | changes
    config, spec = folder.with_suffix(".yaml"), folder.with_suffix(".space.yaml")
    config.write_text(to_yaml(small_run(folder / "unused", manifest, **values).model_dump(mode="json")))
    spec.write_text(to_yaml({"objective": {"every": 5, **PROBE}, "finalists": 0} | space))
    return config, spec


def grid(*temperatures: float) -> dict[str, Any]:
    return {"space": {"loss.temperature": {"grid": list(temperatures)}}, "searcher": "grid"}


def started(*arguments: object, fault: str | None = None) -> AbstractContextManager[subprocess.Popen[str]]:
    """A program of Python's under way."""
    return program(*arguments, variables=injected("SIMCLR_RAY_SEARCH_FAULT", fault, INJECT, commands.INJECT))


def tune_command(config: Path, space: Path, folder: Path) -> list[object]:
    return ["-m", "simclr_ray.cli", "tune", config, "--space", space, "--folder", folder]


def run(*arguments: object, fault: str | None = None) -> tuple[int, str]:
    with started(*arguments, fault=fault) as process:
        output, _ = process.communicate(timeout=1400)
        return process.returncode, output


def sweep(
    config: Path, space: Path, folder: Path, *, cpus: int, fault: str | None = None
) -> tuple[dict[str, Any], str]:
    """A search, and what its Ray had left afterwards."""
    code, output = run("-m", "tests.faults.sweep", config, space, folder, cpus, fault=fault)
    assert code == 0, output
    return json.loads(output.strip().splitlines()[-1]), output


def by_temperature(folder: Path) -> dict[float, TrialRecord]:
    return {one.settings["loss.temperature"]: one for one in read_records(str(folder / "trials"))}


def test_a_search_on_two_cpus_leaves_a_configuration_that_pretrain_takes(data_set: Manifest, tmp_path: Path) -> None:
    """One worker and one CPU for the stream: a trial that held a CPU of its own would wait for itself."""
    folder = tmp_path / "search"
    asked = {"space": {"loss.temperature": {"uniform": [0.1, 0.5]}}, "trials": 1}
    config, space = files(folder, data_set, asked, train__steps=4)
    code, output = run(*tune_command(config, space, folder))
    assert code == 0, output
    records = read_records(str(folder / "trials"))
    assert [one.status for one in records] == ["finished"], output
    assert [[score.step for score in one.scores] for one in records] == [[4]]
    assert "[1/1]" in output
    assert "Configuration for experiment" not in output  # Tune's own
    best = load_config(folder / "best.yaml")
    assert best.loss.temperature == records[0].settings["loss.temperature"]
    assert best.run.folder == str(folder / "best")
    assert (folder / "search.html").is_file()
    assert (folder / "trials.parquet").is_file()
    before = {one.name: (folder / "trials" / one.name / "trial.json").stat().st_mtime_ns for one in records}
    code, output = run(*tune_command(config, space, folder))
    assert code == 0, output
    assert "finished already" in output
    assert {name: (folder / "trials" / name / "trial.json").stat().st_mtime_ns for name in before} == before
    space.write_text(space.read_text().replace("0.5", "0.6"))
    code, output = run(*tune_command(config, space, folder))
    assert code == 2
    assert "space file: space.loss.temperature: the run has" in output


@pytest.mark.slow
def test_finalists_are_trained_again_and_the_best_configuration_trains(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    config, space = files(folder, data_set, grid(0.1, 0.5) | {"finalists": 1, "seeds": 2}, train__steps=4)
    code, output = run(*tune_command(config, space, folder))
    assert code == 0, output
    again = read_records(str(folder / "finalists"))
    assert len(again) == 4
    assert {one.status for one in again} == {"finished"}
    assert " +- " in output
    assert "the spread over 2 seeds" in output
    code, output = run("-m", "simclr_ray.cli", "pretrain", folder / "best.yaml")
    assert code == 0, output
    assert committed_steps(str(folder / "best" / "checkpoints")) == [4]


@pytest.mark.slow
def test_row_48_trials_that_crash_hang_or_diverge_cost_only_themselves(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    config, space = files(folder, data_set, grid(0.1, 0.2, 0.5, 1.0) | {"stall_s": 200.0}, cluster__max_failures=0)
    found, output = sweep(config, space, folder, cpus=3, fault="0.2=nan 0.5=crash 1.0=hang")
    assert found["failed"] is None, output
    assert found["left"] == [], output
    assert found["free_cpus"] == 3
    records = by_temperature(folder)
    assert records[0.1].status == "finished"
    assert records[0.2].status == records[0.5].status == records[1.0].status == "failed"
    assert "diverged" in records[0.2].why
    assert "training stopped" in records[0.5].why
    assert "came for 200 s" in records[1.0].why
    for temperature in (0.2, 0.5, 1.0):
        assert f"trial {records[temperature].name} failed: " in output
    assert load_config(folder / "best.yaml").loss.temperature == 0.1


@pytest.mark.slow
def test_row_48_a_search_whose_trials_all_fail_says_so(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    config, space = files(folder, data_set, grid(0.1, 0.2))
    code, output = run(*tune_command(config, space, folder), fault="0.1=nan 0.2=nan")
    assert code == 5, output
    assert "all 2 trials failed" in output
    assert not (folder / "best.yaml").exists()


@pytest.mark.slow
def test_row_48_a_killed_search_goes_on_where_it_stood(data_set: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    config, space = files(folder, data_set, grid(0.1, 0.5, 1.0), train__steps=400, optim__warmup_epochs=1)

    def in_the_middle() -> bool:
        """One trial is done, another has been scored."""
        records = read_records(str(folder / "trials"))
        done = [one for one in records if one.status == "finished"]
        return bool(done) and any(one.scores and one.status == "running" for one in records)

    space.write_text(space.read_text().replace("every: 5", "every: 100"))
    with started(*tune_command(config, space, folder)) as process:
        wait_for(in_the_middle, timeout_s=900)
        before = {one.name: one for one in read_records(str(folder / "trials"))}
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    code, output = run(*tune_command(config, space, folder))
    assert code == 0, output
    assert "(continues)" in output
    after = {one.name: one for one in read_records(str(folder / "trials"))}
    assert len(after) == 3
    assert {one.status for one in after.values()} == {"finished"}
    for name, record in before.items():
        assert after[name].scores[: len(record.scores)] == record.scores
        steps = [one.step for one in read_jsonl(Path(after[name].generations[0].run) / "metrics.jsonl")]
        assert steps == list(range(1, 401))
    interrupted = next(one for one in before.values() if one.status == "running" and one.scores)
    run_info = json.loads((Path(interrupted.generations[0].run) / "run.json").read_text())
    assert run_info["attempts"] == 2  # it went on; a new one would have begun at step 0 in a folder of its own


@pytest.mark.slow
def test_row_48_a_search_that_was_interrupted_goes_on(data_set: Manifest, tmp_path: Path) -> None:
    """Ctrl-C while it starts, and in the middle of a trial."""
    folder = tmp_path / "search"
    config, space = files(folder, data_set, grid(0.1, 0.5), train__steps=400, optim__warmup_epochs=1)
    space.write_text(space.read_text().replace("every: 5", "every: 100"))
    with started(*tune_command(config, space, folder)) as process:
        wait_for(lambda: (folder / "search.json").is_file(), timeout_s=120)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 130, output
    with started(*tune_command(config, space, folder)) as process:
        wait_for(lambda: any(one.scores for one in read_records(str(folder / "trials"))), timeout_s=600)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 130, output
    assert "run the same command again to continue the search" in output
    before = read_records(str(folder / "trials"))
    code, output = run(*tune_command(config, space, folder))
    assert code == 0, output
    after = {one.name: one for one in read_records(str(folder / "trials"))}
    assert {one.status for one in after.values()} == {"finished"}
    assert len(after) == 2
    for one in before:
        assert after[one.name].scores[: len(one.scores)] == one.scores
        steps = [record.step for record in read_jsonl(Path(one.generations[0].run) / "metrics.jsonl")]
        assert steps == list(range(1, 401))


@pytest.mark.slow
def test_a_search_that_goes_on_with_less_room_trains_no_more_than_fits(data_set: Manifest, tmp_path: Path) -> None:
    """Tune brings back both trials that were under way; together their workers would hold both CPUs."""
    folder = tmp_path / "search"
    config, space = files(folder, data_set, grid(0.1, 0.5) | {"max_concurrent": 2, "stall_s": 100.0},
                          train__steps=400, optim__warmup_epochs=1)  # fmt: skip
    space.write_text(space.read_text().replace("every: 5", "every: 100"))

    def both_train() -> bool:
        runs = [generation.run for one in read_records(str(folder / "trials")) for generation in one.generations]
        return len(runs) == 2 and all((Path(run) / "metrics.jsonl").is_file() for run in runs)

    with started("-m", "tests.faults.sweep", config, space, folder, 3) as process:
        wait_for(both_train, timeout_s=600)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    space.write_text(space.read_text().replace("max_concurrent: 2", "max_concurrent: 1"))
    found, output = sweep(config, space, folder, cpus=2)
    assert found["failed"] is None, output
    assert "side by side: 1" in output
    records = read_records(str(folder / "trials"))
    assert [one.status for one in records] == ["finished", "finished"], output


@pytest.mark.slow
def test_a_killed_search_for_two_objectives_in_an_object_store_goes_on(
    data_set: Manifest, s3: Seaweed, s3_folder: str, tmp_path: Path
) -> None:
    """Optuna's memory, trials, checkpoints and results are all in the bucket."""
    pytest.importorskip("optuna")
    two = {"every": 5, **PROBE, "measure": "knn_top1", "also": "rankme"}
    asked = {"space": {"loss.temperature": {"loguniform": [0.05, 1.0]}}, "searcher": "tpe", "trials": 3,
             "scheduler": "asha", "objective": two}  # fmt: skip
    config, space = files(tmp_path / "search", data_set, asked, storage__endpoint=s3.endpoint)
    command = ["-m", "simclr_ray.cli", "tune", config, "--space", space, "--folder", s3_folder]

    def first_is_done() -> bool:
        return any(one.status == "finished" for one in read_records(f"{s3_folder}/trials"))

    with started(*command) as process:
        wait_for(first_is_done, timeout_s=600)
        before = {one.name: one for one in read_records(f"{s3_folder}/trials") if one.status == "finished"}
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    code, output = run(*command)
    assert code == 0, output
    assert "knn_top1 and rankme" in output
    assert "* no trial beats" in output
    after = {one.name: one for one in read_records(f"{s3_folder}/trials")}
    assert len(after) == 3, output
    assert len({one.settings["loss.temperature"] for one in after.values()}) == 3
    assert {name: after[name] for name in before} == before
    assert {"best.yaml", "search.html", "trials.parquet"} <= set(storage.list_names(s3_folder))


@pytest.mark.slow
def test_trials_that_asha_ends_leave_no_placement_group_and_no_trial_writes_anothers_path(
    data_set: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "search"
    temperatures = [0.05, 0.1, 0.2, 0.5, 1.0, 5.0]
    config, space = files(folder, data_set, grid(*temperatures) | {"scheduler": "asha", "reduction": 2.0},
                          train__steps=600, optim__warmup_epochs=1)  # fmt: skip
    space.write_text(space.read_text().replace("every: 5", "every: 60"))
    found, output = sweep(config, space, folder, cpus=3)
    assert found["failed"] is None, output
    assert found["left"] == [], output
    assert found["free_cpus"] == 3
    records = read_records(str(folder / "trials"))
    ended = [one for one in records if one.status == "stopped early"]
    assert len(records) == 6
    assert ended, output
    assert all(one.scores[-1].step < 600 for one in ended)
    runs = [generation.run for one in records for generation in one.generations]
    assert len(set(runs)) == len(runs) == 6
    for one in records:  # each lies in the folder of its own trial
        assert all(Path(generation.run).parent == folder / "trials" / one.name for generation in one.generations)


@pytest.mark.slow
def test_population_based_training_goes_on_from_the_better_trials_checkpoint(
    data_set: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "search"
    config, space = files(folder, data_set, {
        "space": {"loss.temperature": {"loguniform": [0.05, 5.0]}, "views.strength": {"uniform": [0.0, 1.0]}},
        "trials": 2, "scheduler": "pbt", "quantile": 0.5,
    }, train__steps=300, optim__warmup_epochs=1)  # fmt: skip
    space.write_text(space.read_text().replace("every: 5", "every: 50"))
    found, output = sweep(config, space, folder, cpus=3)
    assert found["failed"] is None, output
    assert found["left"] == [], output
    records = {one.name: one for one in read_records(str(folder / "trials"))}
    lives = [(one, number, life) for one in records.values() for number, life in enumerate(one.generations, 1)]
    begun = [(one, number, life) for one, number, life in lives if life.origin]
    assert begun, output
    for one, number, life in begun:
        assert life.origin is not None
        assert Path(life.origin.run).parent.name in set(records) - {one.name}
        first = read_jsonl(Path(life.run) / "metrics.jsonl")[0].step
        assert first == life.origin.step + 1
        assert all(score.step > life.origin.step for score in one.scores if score.generation == number)
        info = json.loads((Path(life.run) / "run.json").read_text())
        assert info["origin"] == {"folder": life.origin.run, "step": life.origin.step}
        assert 0.05 <= life.settings["loss.temperature"] <= 5.0
        assert 0.0 <= life.settings["views.strength"] <= 1.0
    assert read_record(str(folder / "trials" / begun[0][0].name)) is not None
