"""`simclr-ray submit` and `jobs` as a user calls them, against a real head with a token, started by `ray start`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.version import __version__
from tests.conftest import ROOT
from tests.faults.commands import committed, losses, recipe, steps_done, wait_for
from tests.servers.ray_head import RayHead, authentication, clean_environment, has_dashboard, ray_head

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not has_dashboard(), reason="no jobs API: ray[default] is not installed"),
]
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A head of two CPUs that asks for a token."""
    with ray_head(tmp_path_factory.mktemp("head"), token=TOKEN) as head:
        yield head


def call(
    *arguments: object,
    environment: Mapping[str, str],
    timeout_s: float = 240.0,
    program: str = "simclr_ray.cli",
    folder: Path = ROOT,
) -> Outcome:
    """The command line in a process of its own, for Ray reads its token once a process."""
    done = subprocess.run(
        [sys.executable, "-m", program, *map(str, arguments)], env=clean_environment() | dict(environment),
        cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


def calls(*commands: Sequence[object], environment: Mapping[str, str]) -> list[Outcome]:
    """Several command lines in one process of their own."""
    given = json.dumps([[str(argument) for argument in command] for command in commands])
    done = call(given, environment=environment, program="tests.servers.calls")
    assert done.code == 0, done
    return [Outcome(*outcome) for outcome in json.loads(done.out.splitlines()[-1])]


@pytest.mark.parametrize(("token", "why"), [(None, "none was sent"), ("f" * 32, "it was wrong")])
def test_row_50_a_wrong_or_missing_token_is_code_5(
    head: RayHead, data_set: Manifest, tmp_path: Path, token: str | None, why: str
) -> None:
    file, address = recipe(tmp_path / "run", data_set), ["--address", head.dashboard]
    for outcome in calls(
        ["submit", "pretrain", file, *address], ["jobs", "ls", *address], environment=authentication(tmp_path, token)
    ):
        assert outcome.code == 5, outcome
        assert f"token refused: {why}" in outcome.err
        assert "RAY_AUTH_TOKEN_PATH" in outcome.err
        assert TOKEN not in outcome.out + outcome.err
    assert not (tmp_path / "run").exists()


def test_a_job_that_fails_gives_its_own_exit_code_and_is_listed(
    head: RayHead, data_set: Manifest, tmp_path: Path
) -> None:
    file = recipe(tmp_path / "run", data_set, data__train=f"{tmp_path}/absent")
    address = ["--address", head.dashboard]
    submit = ["submit", "pretrain", file, *address, "--id", "fails"]
    sent, status, listed, again, *absent = calls(
        submit, ["jobs", "status", "fails", *address], ["jobs", "ls", *address], submit,
        *(["jobs", action, "absent", *address] for action in ("status", "logs", "stop")),
        environment=head.environment,
    )  # fmt: skip
    assert sent.code == 3, sent
    assert "no data set here" in sent.out  # the job's own words, streamed
    assert "fails failed with exit code 3" in sent.out
    assert "is not on this machine" in sent.out
    assert (status.code, status.out.split()[:2]) == (0, ["FAILED", "pretrain"])
    assert "exit code 3" in status.out
    assert "fails" in listed.out
    assert (again.code, "exists already" in again.err) == (2, True), again
    for one in absent:
        assert (one.code, "does not exist" in one.err) == (5, True), one


@pytest.mark.slow
def test_versions_that_differ_from_the_submitters_are_code_5(head: RayHead, data_set: Manifest, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'submit' in sys.argv:\n    import importlib.metadata as m\n    was = m.version\n"
        "    m.version = lambda name: '2.6.0' if name == 'torch' else was(name)\n"
    )
    other = dict(head.environment) | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    sent = call("submit", "pretrain", recipe(tmp_path / "run", data_set), "--address", head.dashboard,
                environment=other)  # fmt: skip
    assert sent.code == 5, sent
    assert "torch: 2.6.0 there" in sent.out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_is_stopped_with_a_checkpoint_and_a_second_one_continues_it(
    head: RayHead, data_set: Manifest, tmp_path: Path
) -> None:
    folder, there = tmp_path / "run", {"environment": head.environment}
    file = recipe(folder, data_set, train__steps=400, train__checkpoint_every=1000)
    sent = call("submit", "pretrain", file, "--address", head.dashboard, "--detach", **there)
    assert sent.code == 0, sent
    job = sent.out.strip().splitlines()[-1].removeprefix("job: ")
    assert job.startswith("pretrain-run-")
    wait_for(lambda: steps_done(folder) >= 5, timeout_s=180)
    assert call("jobs", "status", job, "--address", head.dashboard, **there).out.startswith("RUNNING")
    assert committed(folder) == []
    stopped = call("jobs", "stop", job, "--address", head.dashboard, **there)
    assert (stopped.code, f"{job} was stopped" in stopped.out) == (0, True), stopped
    (saved,) = committed(folder)
    assert 5 <= saved < 400
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert "stopping after a last checkpoint" in call("jobs", "logs", job, "--address", head.dashboard, **there).out

    again = call("submit", "pretrain", file, "--address", head.dashboard, timeout_s=400, **there)
    assert again.code == 0, again
    assert f"continuing from the checkpoint of step {saved}" in again.out
    assert "succeeded" in again.out
    assert sorted(losses(folder)) == list(range(1, 401))


@pytest.mark.slow
def test_a_verb_of_folders_runs_as_a_job_with_its_flags(head: RayHead, data_set: Manifest, tmp_path: Path) -> None:
    sent = call("submit", "pack", data_set.folder, tmp_path / "packed", "--address", head.dashboard,
                "--flags=--labels stored --seed 5", environment=head.environment)  # fmt: skip
    assert sent.code == 0, sent
    assert "packed 400 images" in sent.out
    assert read_manifest(str(tmp_path / "packed")).rows == 400


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_plain_ray_job_submit_runs_the_entrypoints_of_the_jobs_folder(
    head: RayHead, data_set: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    file = recipe(folder, data_set, train__steps=4)
    sent = call(
        "job", "submit", "--address", head.dashboard, "--working-dir", ROOT / "jobs", "--",
        "python", "pretrain.py", file, "--set", "train.log_every=2",
        environment=head.environment, program="ray.scripts.scripts", timeout_s=300,
    )  # fmt: skip
    assert sent.code == 0, sent
    assert "encoder: " in sent.out
    assert committed(folder) == [4]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_with_another_package_or_none_gets_the_source_that_is_here(
    head: RayHead, data_set: Manifest, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "simclr_ray", tmp_path / "here" / "simclr_ray", ignore=shutil.ignore_patterns("__pycache__"))
    version = tmp_path / "here" / "simclr_ray" / "version.py"
    version.write_text(version.read_text().replace(f'"{__version__}"', f'"{__version__}+here"'))
    file = recipe(tmp_path / "run", data_set, train__steps=4)
    sent = call(
        "submit", "pretrain", file, "--address", head.dashboard, "--environment", "source",
        environment=dict(head.environment) | {"PYTHONPATH": str(tmp_path / "here")}, folder=tmp_path,
    )  # fmt: skip
    assert sent.code == 0, sent
    assert committed(tmp_path / "run") == [4]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["version"] == f"{__version__}+here"


@pytest.mark.slow
def test_an_open_cluster_on_another_machine_is_refused_unless_allowed(data_set: Manifest, tmp_path: Path) -> None:
    file = recipe(tmp_path / "run", data_set, data__train=f"{tmp_path}/absent")
    with ray_head(tmp_path, token=None) as head:
        # 0.0.0.0 is this machine too, but no loopback address: as good as another one to who looks at the address.
        elsewhere = head.dashboard.replace("127.0.0.1", "0.0.0.0")
        submit = ["submit", "pretrain", file, "--address"]
        refused, allowed, near = calls(
            [*submit, elsewhere],
            [*submit, elsewhere, "--allow-unauthenticated", "--detach"],
            [*submit, head.dashboard, "--detach"],
            environment=head.environment,
        )
        assert refused.code == 5, refused
        assert "asks for no token, so whoever reaches it can run any program" in refused.err
        assert "--allow-unauthenticated" in refused.err
        assert allowed.code == 0, allowed
        assert "WARNING: the dashboard at http://0.0.0.0" in allowed.out
        assert (near.code, "WARNING" in near.out) == (0, False), near


@pytest.mark.slow
def test_row_50_training_at_a_cluster_that_refuses_the_token_is_code_5(
    head: RayHead, data_set: Manifest, tmp_path: Path
) -> None:
    file = recipe(tmp_path / "run", data_set, cluster__address=head.gcs)
    outcome = call("pretrain", file, environment={"RAY_AUTH_MODE": "disabled"})
    assert (outcome.code, "token refused" in outcome.err) == (5, True), outcome
