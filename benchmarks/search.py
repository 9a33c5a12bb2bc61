"""Claim: a search finds what is known of temperature and jitter, costs little beside its trainings, survives a kill.

    python -m benchmarks.search [FOLDER] [--quick]

Runs the command `simclr-ray tune` over a grid on the images that come with the clone: temperatures of which the ends
are known to be worse (SimCLR, table 5), with jitter and without (its figure 5). All cells and the configuration as
given are then trained again by other seeds, which gives each its spread. While they are, the command is killed and
given again.

Prints and keeps in results/search.json: mean and spread of each cell; how the measures without labels rank the trials
against those with labels; the wall time of the search beside the seconds that the same trainings take one by one as
commands; what was kept of the killed search.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import machine
from simclr_ray.configure import to_yaml
from simclr_ray.search.finalists import Finalist, summarise, verdict
from simclr_ray.search.objective import agreement
from simclr_ray.search.record import TrialRecord, read_records
from simclr_ray.search.space import LABELLED
from tests.faults.commands import program

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "jobs/fashion_mnist.yaml"
RESULT = ROOT / "benchmarks/results/search.json"
OVERRIDES = ["train.epochs=2", "cluster.workers=1", "data.steps_ahead=16", "train.checkpoint_every=1000"]
TEMPERATURES, STRENGTHS, SEEDS = (0.005, 0.1, 0.5, 5.0), (0.0, 0.5), 2
ALONE = 3
"""Trainings that are timed as commands of their own."""


def space(temperatures: tuple[float, ...], seeds: int) -> dict[str, Any]:
    return {
        "space": {
            "loss.temperature": {"grid": list(temperatures)},
            "views.strength": {"grid": list(STRENGTHS)},
        },
        "searcher": "grid",
        "objective": {"every": 128, "images": 2048, "voters": 8192, "views": 4},
        "finalists": len(temperatures) * len(STRENGTHS),
        "seeds": seeds,
    }


@dataclass(frozen=True)
class Ended:
    """One start of the command."""

    code: int
    until_finalists_s: float | None


def search(folder: Path, space_file: Path, overrides: list[str], stop: Callable[[], bool] = lambda: False) -> Ended:
    """`simclr-ray tune`, its lines passed on; killed, as by the kernel, as soon as `stop` says so."""
    sets = [part for change in overrides for part in ("--set", change)]
    command = ["-m", "simclr_ray.cli", "tune", RECIPE, "--space", space_file, "--folder", folder, *sets]
    began, until = time.monotonic(), None
    with program(*command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            if until is None and "finalists: " in line:
                until = time.monotonic() - began
            if stop():
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
    return Ended(process.returncode, until)


def whole(folder: Path) -> dict[str, str]:
    """What the finished trials have measured, as it stands on the disk; as text, in which NaN equals itself."""
    return {
        one.name: json.dumps([score.measures for score in one.scores])
        for part in ("trials", "finalists")
        for one in read_records(str(folder / part))
        if one.status == "finished"
    }


def train_alone(folder: Path, overrides: list[str], settings: dict[str, Any]) -> float:
    """Seconds of one training as a command, start of Ray included."""
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    sets = [part for change in (*overrides, *given, f"run.folder={folder}") for part in ("--set", change)]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "simclr_ray.cli", "pretrain", str(RECIPE), *sets],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return time.monotonic() - began


def table(finalists: list[Finalist]) -> list[dict[str, Any]]:
    """Of all cells and the configuration as given, best first."""
    return [
        {"name": one.name, "settings": dict(one.settings), "mean": one.mean, "spread": one.spread,
         "values": list(one.values)}
        for one in finalists
    ]  # fmt: skip


def correlations(records: list[TrialRecord]) -> dict[str, dict[str, float]]:
    """Spearman's, of each measure without labels with each that has them."""
    lasts = [one.scores[-1].measures for one in records]
    return {labelled: agreement(lasts, labelled) for labelled in LABELLED}


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    temperatures, seeds = (TEMPERATURES[1:3], 1) if quick else (TEMPERATURES, SEEDS)
    overrides = [*OVERRIDES, *(["train.epochs=0.5", "optim.warmup_epochs=0.1"] if quick else [])]
    space_file = folder / "space.yaml"
    space_file.write_text(to_yaml(space(temperatures, seeds)))
    at = folder / "search"
    first = search(
        at, space_file, overrides, lambda: any(one.status == "finished" for one in read_records(str(at / "finalists")))
    )
    before = whole(at)
    second = search(at, space_file, overrides)
    assert second.code == 0, second
    after = whole(at)
    records = read_records(str(at / "trials"))
    listed = [(name, values) for name, values in json.loads((at / "finalists.json").read_text())]
    finalists = summarise(listed, read_records(str(at / "finalists")), "knn_top1")
    alone = [
        train_alone(folder / f"alone-{number}", overrides, dict(one.settings))
        for number, one in enumerate(records[:ALONE])
    ]
    assert first.until_finalists_s is not None
    return {
        "machine": machine(),
        "overrides": overrides,
        "trials": [{"settings": dict(one.settings), "measures": dict(one.scores[-1].measures)} for one in records],
        "again": table(finalists),
        "verdict": verdict(finalists),
        "spearman": correlations(records),
        "search_s": first.until_finalists_s,
        "alone_s": alone,
        "search_to_alone": first.until_finalists_s / (mean(alone) * len(records)),
        "more_a_trial_s": first.until_finalists_s / len(records) - mean(alone),
        "killed": {
            "code": first.code,
            "finished_before": len(before),
            "of_them_as_they_were": sum(after[name] == one for name, one in before.items()),
            "finished_after": len(after),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the search is kept")
    parser.add_argument("--quick", action="store_true", help="short trainings of four cells, unrecorded")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, quick=args.quick)
    text = json.dumps(result, indent=1)
    print(text)
    if not args.quick:
        RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
