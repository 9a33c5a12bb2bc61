"""What is sent to a cluster and what comes back, without one: orders, environments, lines of a log, exit codes."""

from __future__ import annotations

import json
import shlex
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml
from ray.dashboard.modules.job.pydantic_models import JobDetails

from simclr_ray.cli import _parser, main
from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ClusterError, ConfigError, DataError
from simclr_ray.submit.client import dashboard_address, refuse_open
from simclr_ray.submit.follow import Lines, exit_code, verdict
from simclr_ray.submit.order import VERBS, job_id, order, runtime_env
from simclr_ray.submit.pinned import differing
from simclr_ray.train.dashboard import knock, on_this_machine
from simclr_ray.version import PINNED
from tests.conftest import ROOT, small_run


def test_an_order_is_the_whole_configuration_resolved_and_loads_back_there(data_set: Manifest, tmp_path: Path) -> None:
    config = small_run(tmp_path / "run", data_set, train__steps=4, cluster__address="10.0.0.1:6379")
    sent = order("pretrain", config, ["loss.temperature=0.3"], options=["--fresh"])
    assert sent.config
    there = load_config(yaml.safe_load(sent.config))
    assert there.loss.temperature == 0.3
    assert there.cluster.address is None  # a job joins the cluster it runs on
    assert (
        there.model_dump() == load_config(config, ["loss.temperature=0.3", "cluster.address=null"]).model_dump()
    )  # and nothing else differs
    assert shlex.split(sent.entrypoint) == ["python", "-m", "simclr_ray.cli", "pretrain", "config.yaml", "--fresh"]
    assert any("cluster.address=10.0.0.1:6379 is left out" in warning for warning in sent.warnings)
    assert any(
        f"data.train={data_set.folder} must be on a file system that all nodes share" in w for w in sent.warnings
    )
    assert job_id(sent).startswith("pretrain-run-")
    assert job_id(sent) != job_id(sent)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"loss__temperature": 0.5, "run__folder": "runs/x"}, ConfigError, "run.folder: runs/x"),
        ({"data__train": "data/x"}, ConfigError, "data.train: data/x"),
        ({"run__folder": None}, ConfigError, "run.folder must be set"),
        ({"train__global_batch": 4096}, ConfigError, "one global batch needs more images"),
        ({"cluster__workers": 5}, ConfigError, "cluster.workers"),
    ],
)
def test_what_cannot_work_there_is_refused_before_anything_is_sent(
    data_set: Manifest, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    config = small_run(tmp_path / "run", data_set, **({"train__steps": 4} | changes))
    with pytest.raises(error, match=words):
        order("pretrain", config)


def test_a_data_set_that_is_here_and_broken_is_refused_and_one_that_is_not_here_is_noted(
    data_set: Manifest, tmp_path: Path
) -> None:
    absent = small_run(tmp_path / "run", data_set, train__steps=4, data__train="/nowhere/at/all")
    assert any("is not on this machine" in warning for warning in order("pretrain", absent).warnings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        order("pretrain", small_run(tmp_path / "run", data_set, train__steps=4, data__train=str(tmp_path / "empty")))


def test_paths_of_a_cluster_on_this_machine_are_made_absolute(
    data_set: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sent = order("pretrain", small_run(Path("runs/x"), data_set, train__steps=4), remote=False)
    assert yaml.safe_load(sent.config or "")["run"]["folder"] == str(tmp_path / "runs" / "x")


def test_evaluate_takes_a_run_folder_and_other_verbs_are_refused() -> None:
    sent = order("evaluate", "s3://bucket/run", ["evaluate.knn_k=5"])
    assert shlex.split(sent.entrypoint)[3:] == ["evaluate", "s3://bucket/run", "--set", "evaluate.knn_k=5"]
    assert sent.config is None
    with pytest.raises(ConfigError, match="folder 1: runs/x"):
        order("evaluate", "runs/x")
    packed = order("pack", "s3://b/images", folders=["s3://b/data"], options=["--labels", "folder"])
    assert shlex.split(packed.entrypoint)[3:] == ["pack", "s3://b/images", "s3://b/data", "--labels", "folder"]
    for wrong in (lambda: order("pack", "s3://b/images"), lambda: order("pretrain", None, folders=["s3://b/x"])):
        with pytest.raises(ConfigError, match="folders"):
            wrong()
    with pytest.raises(ConfigError, match="cannot be submitted"):
        order("preview", "x.yaml")


def test_the_environment_gives_time_to_save_and_holds_the_versions_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    env = runtime_env(tmp_path, {"torch": "2.14.1"}, stop_wait_s=300)
    assert env["working_dir"] == str(tmp_path)
    assert env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "300"
    assert json.loads(env["env_vars"][PINNED]) == {"torch": "2.14.1"}
    assert "py_modules" not in env
    assert "planted-secret" not in str(env)
    assert PINNED not in runtime_env(None, None)["env_vars"]
    assert runtime_env(tmp_path, None, package=tmp_path / "simclr_ray")["py_modules"] == [str(tmp_path / "simclr_ray")]


def test_versions_are_compared_without_the_build_and_a_package_that_is_missing_differs() -> None:
    assert differing({"torch": "2.14.1+cpu", "ray": "2.60.0"}, {"torch": "2.14.1+cu130", "ray": "2.60.0"}) == []
    assert differing({"torch": "2.6.0"}, {"torch": "2.14.1"}) == ["torch: 2.6.0 there, 2.14.1 here"]
    assert differing({"torch": "2.6.0"}, {}) == ["torch: 2.6.0 there, None here"]


def test_row_51_a_job_with_other_versions_ends_with_code_5_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PINNED, json.dumps({"numpy": "1.0"}))
    assert main(["pretrain", "absent.yaml"]) == 5
    said = capsys.readouterr().err
    assert "numpy: 1.0 there" in said
    assert "--any-versions" in said


@hypothesis.given(st.text(alphabet="ab\n", max_size=60), st.data())
def test_lines_are_said_once_each_however_the_log_comes_and_breaks_off(text: str, data: st.DataObject) -> None:
    said: list[str] = []
    lines = Lines(said.append)
    for _ in range(data.draw(st.integers(0, 3))):  # connections that break somewhere
        lines.rewind()
        _feed(lines, text[: data.draw(st.integers(0, len(text)))], data)
    lines.rewind()
    _feed(lines, text, data)
    lines.end()
    expected = text.split("\n")
    assert said == (expected if expected[-1] else expected[:-1])


def _feed(lines: Lines, text: str, data: st.DataObject) -> None:
    while text:
        size = data.draw(st.integers(1, len(text)))
        lines.take(text[:size])
        text = text[size:]


def ended(status: str, code: int | None = None, message: str | None = None) -> JobDetails:
    """As the jobs API tells of a job that has ended."""
    return JobDetails(type="SUBMISSION", entrypoint="x", status=status, driver_exit_code=code, message=message)


@pytest.mark.parametrize(
    ("details", "code", "words"),
    [
        (ended("SUCCEEDED", 0), 0, "j succeeded"),
        (ended("STOPPED"), 130, "was stopped; submit it again"),
        *((ended("FAILED", code), code, f"failed with exit code {code}") for code in (1, 2, 3, 4, 5, 6, 130)),
        (ended("FAILED", 137), 5, "failed with exit code 137 (killed)"),
        (ended("FAILED", -9), 5, "failed with exit code -9 (killed)"),
        (ended("FAILED", 42), 5, "failed with exit code 42"),
        (ended("FAILED", None, "Traceback\nsetup failed"), 5, "did not run: setup failed"),
        (ended("FAILED", None), 5, "does not say why"),
    ],
)
def test_how_a_job_ended_is_our_exit_code(details: JobDetails, code: int, words: str) -> None:
    assert exit_code(details) == code
    assert words in verdict("j", details)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://head:8265", "http://head:8265"), ("head:8265", "http://head:8265"),
        ("https://ray.example.org/team/", "https://ray.example.org/team"),
    ],
)  # fmt: skip
def test_an_address_is_the_dashboards(given: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert dashboard_address(given) == address
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", given)
    assert dashboard_address(None) == address


@pytest.mark.parametrize("given", ["ray://head:10001", "http://user:planted@head:8265", "http://", None])
def test_what_is_no_dashboards_address_is_refused(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="--address") as told:
        dashboard_address(given)
    assert "planted" not in str(told.value)


def test_only_loopback_is_this_machine() -> None:
    assert on_this_machine("http://127.0.0.1:8265")
    assert on_this_machine("http://localhost:8265")
    assert on_this_machine("http://[::1]:8265")
    for elsewhere in ("http://0.0.0.0:8265", "http://10.0.0.1:8265", "http://name.invalid:8265"):
        assert not on_this_machine(elsewhere)


@pytest.fixture
def answering() -> Iterator[Any]:
    """A server that answers as it is told."""
    servers: list[HTTPServer] = []

    def start(status: int, kind: str = "application/json") -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert "Authorization" not in self.headers
                self.send_response(status)
                self.send_header("Content-Type", kind)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:1/login")
                self.end_headers()
                self.wfile.write(b"[]")

            def log_message(self, *_: object) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://0.0.0.0:{server.server_port}"  # this machine, by an address that is no loopback

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [401, 403, 302, 404])
def test_a_dashboard_behind_any_guard_is_let_be(answering: Any, status: int) -> None:
    address = answering(status)
    assert knock(address) == "guarded"
    refuse_open(address, allow=False, say=pytest.fail)


def test_row_50_an_open_dashboard_elsewhere_is_refused_and_with_leave_warned_of(answering: Any) -> None:
    address = answering(200)
    with pytest.raises(ClusterError, match="asks for no token, so whoever reaches it can run any program") as told:
        refuse_open(address, allow=False, say=pytest.fail)
    assert told.value.exit_code == 5
    said: list[str] = []
    refuse_open(address, allow=True, say=said.append)
    assert said[0].startswith("WARNING: the dashboard at http://0.0.0.0")
    refuse_open(address.replace("0.0.0.0", "127.0.0.1"), allow=False, say=pytest.fail)
    assert knock(answering(200, "text/html")) == "guarded"  # a login page


def test_a_dashboard_that_is_not_there_or_not_well_is_an_error(answering: Any) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with pytest.raises(ClusterError, match="no Ray dashboard answers"):
            knock(f"http://127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(ClusterError, match="not well"):
        knock(answering(502))


def commands_of_the_guide() -> list[list[str]]:
    """Every `simclr-ray` command that `cluster/README.md` shows."""
    text = (ROOT / "cluster" / "README.md").read_text().replace("\\\n", " ")  # a command over two lines
    lines = [line for line in text.splitlines() if line.startswith("simclr-ray ")]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("command", commands_of_the_guide(), ids=" ".join)
def test_commands_of_the_guide_are_ones_that_the_command_line_takes(command: list[str]) -> None:
    options = _parser().parse_args(command[1:])
    assert callable(options.call)
    if command[1] == "submit" and VERBS[options.verb] == 0:
        load_config(ROOT / options.target, options.set)
