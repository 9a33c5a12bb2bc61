"""Runs of `simclr-ray pretrain` as a user starts them, in a process of their own with a local Ray of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil

from simclr_ray.configure import to_yaml
from simclr_ray.data.manifest import Manifest
from simclr_ray.observe.metrics import read_jsonl
from simclr_ray.train.checkpoint import committed_steps
from tests.conftest import small_run

STEPS = 30
INJECT = Path(__file__).parent / "inject"


def recipe(folder: Path, manifest: Manifest, **changes: Any) -> Path:
    """A small run in a YAML file beside its folder."""
    config = small_run(folder, manifest, **({"train__steps": STEPS, "train__checkpoint_every": 10} | changes))
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(config.model_dump(mode="json")))
    return file


@contextmanager
def program(*arguments: object, variables: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A program of Python's under way, with these variables; killed at the end if it still runs, by its process id."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment | (variables or {}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def injected(variable: str, fault: str | None, *folders: Path) -> dict[str, str]:
    """Variables with which the modules of these folders let a fault happen inside the program."""
    if fault is None:
        return {}
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {variable: fault, "PYTHONPATH": os.pathsep.join(paths)}


def started(file: Path, *options: str, fault: str | None = None) -> AbstractContextManager[subprocess.Popen[str]]:
    """`simclr-ray pretrain` under way."""
    variables = injected("SIMCLR_RAY_FAULT", fault, INJECT)
    return program("-m", "simclr_ray.cli", "pretrain", file, *options, variables=variables)


def run(file: Path, *options: str, fault: str | None = None, timeout_s: float = 240.0) -> tuple[int, str]:
    """The command to its end: exit code, and all it printed."""
    with started(file, *options, fault=fault) as process:
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output


def losses(folder: Path) -> dict[int, float]:
    """By step."""
    return {record.step: record.values["train/loss"] for record in read_jsonl(folder / "metrics.jsonl")}


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 120.0) -> None:
    """A fault is scheduled by what has happened, not by luck."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the moment for the fault never came"
        time.sleep(0.02)


def steps_done(folder: Path) -> int:
    """Steps in the metrics so far."""
    file = folder / "metrics.jsonl"
    return len(read_jsonl(file)) if file.exists() else 0


def committed(folder: Path) -> list[int]:
    """Steps with a checkpoint."""
    return committed_steps(str(folder / "checkpoints"))


def train_workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray Train's workers below a command."""
    return processes(process, "RayTrainWorker")


def processes(process: subprocess.Popen[str], actor: str) -> list[psutil.Process]:
    """Processes of an actor's class below a command."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [one for one in below if actor in " ".join(_command(one)) and "ray::" in " ".join(_command(one))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
