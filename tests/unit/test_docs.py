"""The documentation says what the code does: its commands are the program's, its settings exist, its Python runs.

Every block of commands, YAML or Python is at least read by what would read it: commands by the parser of the command
line, YAML by the validation of settings, Python by the compiler. A block after the line `<!-- run -->` is executed
here, and one after `<!-- run slowly -->` by tests/integration/test_guide.py. The others are in `NOT_RUN`, each with its
reason.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from simclr_ray.cli import _parser, main
from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest
from tests.unit.publish.made import made_run, results

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FENCE = re.compile(
    r"(?:<!-- (?P<run>run|run slowly) -->\n)?^```(?P<language>[a-z]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    run: str
    """`run`, `run slowly`, or empty."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield Block(page, line, match["language"], match["text"], match["run"] or "")


def commands(block: Block) -> Iterator[list[str]]:
    """Calls of `simclr-ray` in a shell block, as lists of arguments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r";\s*(?:do\s+)?|&&", line):
            words = shlex.split(part, comments=True)
            if words[:1] == ["simclr-ray"]:
                yield words[1:]


BLOCKS = list(blocks())
NOT_RUN = {
    ("CONTRIBUTING.md", "make test"): "this run of the tests is one of them",
    ("README.md", "make demo    # install, train an encoder, evaluate it, print where the pictures are"):
        "ten minutes; tests/integration/test_guide.py trains by the same recipe, for fewer epochs",
    ("README.md", "simclr-ray report runs/fashion-mnist -o report.html"): "run as docs/after-training.md has it",
    ("README.md", "simclr-ray pack SOURCE data/mine                    # any source -> shards + manifest"):
        "a ResNet-50 on ImageNet; the verbs are run as docs/your-images.md has them",
    ("README.md", "simclr-ray submit pretrain run.yaml --address http://HOST:8265 --set run.folder=s3://... "
        "--set data.train=s3://..."): "a cluster's address; tests/integration/test_submit.py",
    ("README.md", "simclr-ray tune jobs/fashion_mnist.yaml --space jobs/spaces/temperature.yaml --folder runs/search"):
        "an hour; tests/faults/test_search_faults.py",
    ("README.md", "simclr-ray embed runs/mine data/mine vectors/mine                # every image a vector, "
        "in Parquet files"): "most as docs/after-training.md has them; `import` and formats: tests/unit/publish",
    ("README.md", "import simclr_ray"): "run as docs/index.md has it",
    ("README.md", 'views = simclr_ray.two_views(encoded, size=224, seed=0, policy="imagenet")  '
        "# list of bytes -> (n, 2, 224, 224, 3) uint8"): "run as docs/index.md has it",
    ("README.md", "loss = simclr_ray.nt_xent(view_a, view_b, temperature=0.1)  "
        "# projections (n, D) each; row i of both is one image"): "run as docs/index.md has it",
    ("docs/cluster.md", "simclr-ray check jobs/imagenet_resnet50.yaml --set data.train=s3://bucket/train "
        "--set run.folder=s3://bucket/runs/one"): "a bucket and a cluster",
    ("docs/cluster.md", "simclr-ray submit pretrain jobs/imagenet_resnet50.yaml --address http://HOST:8265 "
        "--set data.train=s3://bucket/train --set run.folder=s3://bucket/runs/one --detach"): "a cluster's address",
    ("docs/cluster.md", "sudo python -m benchmarks.rehearsal"): "eight minutes as root; tests/faults/test_rehearsal.py",
    ("docs/index.md", "make demo"): "as in the README",
    ("docs/search.md", "simclr-ray tune jobs/fashion_mnist.yaml --space jobs/spaces/temperature.yaml "
        "--folder runs/search"): "an hour; tests/faults/test_search_faults.py",
    ("docs/search.md", "for t in 0.05 0.1 0.2 0.5; do simclr-ray pretrain jobs/fashion_mnist.yaml "
        "--set loss.temperature=$t --set run.folder=runs/by-hand/t$t --set train.epochs=4; done"): "ten minutes",
}  # fmt: skip
"""Page and first line of each block that no test executes, and why."""


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "bash"], ids=str)
def test_commands_are_the_programs(block: Block) -> None:
    for arguments in commands(block):
        try:
            options = _parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{block}: simclr-ray {shlex.join(arguments)} is no command of this program")
        settings = getattr(options, "set", None) or []
        # A shell variable is no value yet; the key must exist all the same.
        load_config(None, [text.replace("=$t", "=0.1") if "$" in text else text for text in settings])
    for target in re.findall(r"^make ([a-z0-9-]+)", block.text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), f"{block}: make {target}"


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "yaml"], ids=str)
def test_settings_exist_and_fit(block: Block) -> None:
    load_config(yaml.safe_load(block.text))


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "python"], ids=str)
def test_python_compiles_and_imports_what_exists(block: Block) -> None:
    compile(block.text, str(block), "exec")
    import simclr_ray

    for name in re.findall(r"\bsimclr_ray\.([a-z_0-9]+)", block.text):
        assert hasattr(simclr_ray, name) or (ROOT / "simclr_ray" / name).exists(), f"{block}: simclr_ray.{name}"


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.run == "run" and one.language == "python"], ids=str)
def test_python_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(block.text, str(block), "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.run == "run" and one.language == "bash"], ids=str)
def test_commands_run(
    block: Block,
    tmp_path: Path,
    data_set: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a folder with the recipes and two runs."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    made_run(tmp_path / "runs" / "mine", data_set, evaluation=results(0.8))
    made_run(tmp_path / "runs" / "other", data_set, evaluation=results(0.7), loss__temperature=0.1)
    monkeypatch.chdir(tmp_path)
    for arguments in commands(block):
        assert main(arguments) == 0, (arguments, capsys.readouterr())
        if "-o" in arguments:
            assert Path(arguments[arguments.index("-o") + 1]).stat().st_size > 1000


def test_a_block_is_run_or_stands_in_the_list_of_those_that_are_not() -> None:
    """A new block must be one or the other; and this file would pass over pages that it cannot read."""
    left = {(str(one.page.relative_to(ROOT)), one.text.split("\n")[0]) for one in BLOCKS
            if not one.run and one.language in ("bash", "python")}  # fmt: skip
    assert left == set(NOT_RUN)
    for reason in NOT_RUN.values():
        for path in re.findall(r"(?:tests|docs)/[\w/.]+\.\w+", reason):
            assert (ROOT / path).exists(), path
    for page in PAGES:
        told = page.read_text().count("<!-- run")
        assert told == sum(bool(one.run) for one in BLOCKS if one.page == page), page


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for match in LINK.finditer(page.read_text()):
            target = match["target"].partition("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_question_is_about_a_real_message() -> None:
    """Headings are what the program says; `...` stands for what differs each time."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "simclr_ray").rglob("*.py")))
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "faq.md").read_text(), flags=re.MULTILINE)
    assert len(headings) > 10
    for heading in headings:
        pattern = ".*".join(map(re.escape, heading.split(" ... ")))
        assert re.search(pattern, source), heading


def test_the_reference_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_exit_codes_are_the_readmes() -> None:
    tables = []
    for page in ("README.md", "docs/operating.md"):
        found = re.search(
            r"^\| (?:exit )?code \| meaning \|.*?\n\n", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
        )
        assert found, page
        tables.append(re.findall(r"^\| (\d+) \| ([^|]+) \|", found[0], flags=re.MULTILINE))
    assert tables[0] == tables[1]
    assert len(tables[0]) == 8


def test_the_rehearsal_is_as_recorded() -> None:
    found = json.loads((ROOT / "benchmarks/results/rehearsal.json").read_text())
    losses, planes = found["losses"], found["planes"]
    page = (ROOT / "docs/cluster.md").read_text()
    assert losses["same"]
    assert "\n".join(line.strip() for line in losses["told"][:-1]) in page
    text = " ".join(page.split())
    assert f"Each of its {losses['steps']} losses is there once." in text
    assert f"by at most {losses['largest']:.1e} of their value." in text
    for page_text in (text, " ".join((ROOT / "README.md").read_text().split())):
        assert f"from {planes['one_host']:.0f} to {planes['two_hosts']:.0f} images a second" in page_text


@pytest.mark.slow
def test_the_site_builds_strictly_and_asks_nobody(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="no mkdocs-material: pip install simclr-ray[docs]")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = sorted(site.rglob("*.html"))
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)["nav"]
    assert len(re.findall(r"\.md", json.dumps(nav))) == len(list((ROOT / "docs").rglob("*.md")))
    assert len(pages) >= 14
    for page in pages:
        asked = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not asked, (page, asked)
