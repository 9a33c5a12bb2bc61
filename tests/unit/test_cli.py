"""The command line: the exit code says whose turn it is, and stderr says in a sentence what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import simclr_ray
from simclr_ray.cli import main
from simclr_ray.configure import all_keys, load_config, to_yaml
from simclr_ray.data.manifest import Manifest
from simclr_ray.train.derive import derive
from simclr_ray.train.run import open_run
from tests.conftest import make_data_set, real_rows

CONFIG, DATA, STORAGE = 2, 3, 4


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def ray_runs() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@pytest.fixture(autouse=True)
def ray_is_not_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A verb that came as far as Ray would look for this cluster for minutes, and then end with code 5."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = ray_runs()
    yield
    assert ray_runs() == before


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


def command(*arguments: object, folder: Path) -> Outcome:
    """The command line as people call it: a process of its own, whose Ray would leave its session in `folder`."""
    environment = os.environ | {"RAY_TMPDIR": str(folder / "ray"), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "simclr_ray.cli", *map(str, arguments)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not (folder / "ray").exists()
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """100 images in 6 units of 16."""
    return make_data_set(tmp_path_factory.mktemp("data"), real_rows(100))


def sections(folder: Path, packed: Manifest) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder)},
        "data": {"train": packed.folder},
        "views": {"preset": "cifar"},
        "model": {"encoder": "small"},
        "optim": {"warmup_epochs": 0},
        "train": {"global_batch": 64, "steps": 2},
    }


@pytest.fixture
def file(tmp_path: Path, packed: Manifest) -> Path:
    """A configuration with which nothing is wrong."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(sections(tmp_path / "run", packed)))
    return path


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """The outcome is an error of the user's: its code, one sentence on stderr, no traceback."""
    assert outcome.code == code, outcome
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err + outcome.out
    assert "pydantic" not in outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def test_a_typo_in_the_file_is_named_with_its_path_and_what_was_meant(tmp_path: Path, file: Path) -> None:
    file.write_text(file.read_text() + "loss:\n  temprature: 0.2\n")
    refused(command("pretrain", file, folder=tmp_path), CONFIG, "loss.temprature: unknown key", "loss.temperature?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["pretrain", "config"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.temprature=0.2", ["loss.temprature: unknown key", "did you mean loss.temperature?"]),
        ("batch_size=64", ["batch_size: unknown key", "did you mean train.global_batch?"]),
        ("loss.temperature=0", ["loss.temperature", "got 0", "greater than 0"]),
        ("loss.temperature=-0.5", ["loss.temperature", "got -0.5", "greater than 0"]),
        ("train.global_batch=128", ["train.global_batch", "got 128", "at most 96", "train.global_batch=96"]),
        ("train.global_batch=50", ["train.global_batch", "multiple of", "16", "use 48 or 64"]),
        ("train.epochs=3", ["train.epochs, train.steps", "give one of them"]),
        ("train.steps=null", ["neither train.epochs nor train.steps"]),
        ("optim.warmup_epochs=5", ["optim.warmup_epochs", "leaves nothing of 2 steps"]),
        ("train.steps", ["key=value"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_cannot_work_is_code_2(run: Run, file: Path, verb: str, override: str, words: list[str]) -> None:
    refused(run(verb, file, "--set", override), CONFIG, *words)
    assert not (file.parent / "run").exists()


def test_every_mistake_is_listed_at_once(run: Run, file: Path) -> None:
    overrides = ["--set", "train.global_batch=1", "--set", "model.encoder=vgg", "--set", "optim.lr=1"]
    refused(run("pretrain", file, *overrides), CONFIG, "3 mistakes", "train.global_batch", "'vgg'", "optim.lr")


def test_more_workers_than_units_in_a_step_is_code_2_before_anything_starts(run: Run, file: Path) -> None:
    outcome = run("pretrain", file, "--set", "cluster.workers=5")
    refused(outcome, CONFIG, "cluster.workers", "4 units of 16", "got 5", "1 to 4", "train.global_batch=80")
    assert not (file.parent / "run").exists()


@pytest.mark.parametrize("key", ["run.folder", "data.train"])
def test_a_place_that_is_not_given_is_code_2(run: Run, file: Path, key: str) -> None:
    refused(run("pretrain", file, "--set", f"{key}=null"), CONFIG, f"{key} must be set", f"--set {key}=")


def test_a_data_set_that_is_not_there_is_code_3(tmp_path: Path, file: Path) -> None:
    outcome = command("pretrain", file, "--set", f"data.train={tmp_path}/absent", folder=tmp_path)
    refused(outcome, DATA, f"{tmp_path}/absent", "no data set here", "simclr-ray pack")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_someone_else_is_code_2_and_left_alone(run: Run, file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    refused(run("pretrain", file), CONFIG, str(tmp_path / "run"), "not empty", "thesis.tex")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_of_another_configuration_is_code_2(run: Run, file: Path, tmp_path: Path, packed: Manifest) -> None:
    config = load_config(file)
    open_run(config, derive(config, packed), packed.fingerprint)
    before = (tmp_path / "run" / "run.json").read_bytes()
    outcome = run("pretrain", file, "--set", "run.seed=7", "--set", "loss.temperature=0.5")
    refused(outcome, CONFIG, "run.seed: the run has 0, now 7", "loss.temperature: the run has 0.1, now 0.5")
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "must hold sections"),
        ("\x00", "not valid YAML"),
        ("train: 5\n", "train: got 5"),
    ],
    ids=["broken", "a list", "binary", "no section"],
)
def test_a_file_that_is_no_configuration_is_code_2(run: Run, file: Path, text: str, words: str) -> None:
    file.write_text(text)
    refused(run("pretrain", file), CONFIG, words)


def test_a_file_that_is_not_there_is_code_2(run: Run, tmp_path: Path) -> None:
    refused(run("pretrain", tmp_path / "absent.yaml"), CONFIG, f"{tmp_path}/absent.yaml", "not found")
    refused(run("pretrain", tmp_path), CONFIG, str(tmp_path), "not found")


def test_evaluating_what_is_no_run_is_code_2(tmp_path: Path, run: Run) -> None:
    refused(run("evaluate", tmp_path), CONFIG, str(tmp_path), "no run here")
    refused(run("evaluate", tmp_path / "absent"), CONFIG, "no run here")


def test_evaluating_a_run_without_checkpoint_is_code_4(tmp_path: Path, run: Run, file: Path, packed: Manifest) -> None:
    config = load_config(file)
    open_run(config, derive(config, packed), packed.fingerprint)
    refused(run("evaluate", tmp_path / "run"), STORAGE, "no checkpoint yet", "run pretrain first")
    refused(run("evaluate", tmp_path / "run", "--set", "views.size=8"), CONFIG, "only evaluate.*", "views.size=8")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere"])
def test_an_address_where_no_cluster_answers_is_code_5_at_once(tmp_path: Path, file: Path, address: str) -> None:
    outcome = command("pretrain", file, "--set", f"cluster.address={address}", folder=tmp_path)
    refused(outcome, 5, "no Ray cluster answers", address)


def test_fetching_errors_have_their_codes(tmp_path: Path, run: Run) -> None:
    refused(run("fetch-data", "emoji", tmp_path / "new"), DATA, "npm", "--source")
    refused(run("fetch-data", "fashion-mnist", tmp_path / "new", "--source", tmp_path), DATA, "files not found")
    outcome = run("fetch-data", "fashion-mnist", tmp_path / "new", "--source", tmp_path, "--train", "0")
    refused(outcome, CONFIG, "1 or more")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["pretrain"],
        ["evaluate"],
        ["pack", "one"],
        ["fetch-data", "imagenet", "x"],
        ["pack", "a", "b", "-x"],
        ["pack", "a", "b", "--deduplicate", "maybe"],
        ["index", "a", "b", "--kind", "zip"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_code_2_with_the_usage(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == CONFIG
    assert outcome.err.startswith("usage: simclr-ray")


def test_names_that_come_from_strangers_cannot_forge_lines(run: Run, tmp_path: Path) -> None:
    outcome = run("evaluate", tmp_path / "a\nerror: all is well\x1b[2J")
    refused(outcome, CONFIG)
    assert "\x1b" not in outcome.err
    assert not any(line.startswith("error: all is well") for line in outcome.err.splitlines())


def test_the_schema_is_json_that_describes_every_key(tmp_path: Path) -> None:
    outcome = command("config", "--schema", folder=tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    schema = json.loads(outcome.out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    described = set(schema["properties"])
    for name, section in schema["properties"].items():
        part = schema["$defs"][section["$ref"].rpartition("/")[2]]
        assert part["additionalProperties"] is False
        assert all(field["description"] for field in part["properties"].values())
        described |= {f"{name}.{key}" for key in part["properties"]}
    assert described == set(all_keys())


def test_config_prints_yaml_that_loads_back_and_the_derived_numbers(run: Run, file: Path, tmp_path: Path) -> None:
    outcome = run("config", file, "--set", "train.global_batch=32", "--set", "evaluate.seeds=[4, 5]")
    assert (outcome.code, outcome.err) == (0, "")
    expected = load_config(file, ["train.global_batch=32", "evaluate.seeds=[4, 5]"])
    assert yaml.safe_load(outcome.out) == expected.model_dump(mode="json")
    (tmp_path / "printed.yaml").write_text(outcome.out)
    assert load_config(tmp_path / "printed.yaml") == expected
    assert run("config", tmp_path / "printed.yaml").out == outcome.out
    comments = [line for line in outcome.out.splitlines() if line.startswith("# ")]
    for number in ("100 images = 6 units of 16", "4 left out", "62 negatives", "steps: 2", "peak 0.0375"):
        assert any(number in line for line in comments), (number, comments)


def test_config_without_a_file_prints_every_default(run: Run) -> None:
    outcome = run("config")
    assert outcome.code == 0
    assert yaml.safe_load(outcome.out) == load_config().model_dump(mode="json")


def test_the_jobs_that_are_shipped_can_be_printed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    outcome = run("config", root / "jobs" / "fashion_mnist.yaml")
    assert outcome.code == 0, outcome
    assert "# data: 16,384 images" in outcome.out


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    outcome = command("--version", folder=tmp_path)
    assert (outcome.code, outcome.out) == (0, f"simclr-ray {simclr_ray.__version__}\n")


def test_help_names_every_verb(run: Run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for verb in ("pretrain", "evaluate", "pack", "index", "fetch-data", "config"):
        assert verb in outcome.out


def test_verbs_after_training_refuse_what_cannot_work(run: Run, packed: Manifest, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    refused(run("embed", absent, packed.folder, tmp_path / "out"), CONFIG, "no run here")
    refused(run("embed", absent, packed.folder, tmp_path / "out", "--actors", "4:2"), CONFIG, "4:2")
    refused(run("embed", absent, packed.folder, tmp_path / "out", "--actors", "many"), CONFIG, "--actors", "many")
    refused(run("embed", absent, absent, tmp_path / "out"), DATA, "no data set here")
    refused(run("export", absent, tmp_path / "out"), CONFIG, "no run here")
    refused(run("import", absent, tmp_path / "run", "--layout", "pytorch"), STORAGE, "no file here")
    refused(run("distill", absent, tmp_path / "student.yaml"), CONFIG, "not found")
    assert run("neighbours", absent).code == CONFIG
    assert not list(tmp_path.iterdir())


def test_an_encoder_is_exported_by_the_command(run: Run, packed: Manifest, tmp_path: Path) -> None:
    from tests.unit.evaluate.test_evaluate import make_run, settings

    made = make_run(settings(tmp_path / "run", (packed, packed)), packed)
    outcome = run("export", made, tmp_path / "out", "--licence", "MIT", "--projector")
    assert outcome.code == 0, outcome.err
    assert "encoder.safetensors, projector.safetensors, config.json, README.md, SHA256SUMS" in outcome.out
    refused(run("export", made, tmp_path / "out"), CONFIG, "already")
    refused(run("export", made, tmp_path / "other", "--format", "timm"), CONFIG, "no encoder like `small`")
