"""Claim: the loss curve does not depend on the number of workers, nor on a kill in the middle.

Trains the demo's recipe for some steps with 1, 2 and 3 workers (3 does not divide the 4 units of a step), and once
more with a SIGKILL to the whole local cluster after the first checkpoint and the same command again; prints the
losses side by side and writes benchmarks/results/world_sizes.json.

    python benchmarks/world_sizes.py [--steps 40]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

from simclr_ray.observe.metrics import read_jsonl

ROOT = Path(__file__).parents[1]


def command(folder: Path, steps: int, workers: int) -> list[str]:
    changes = {
        "run.folder": folder,
        "train.epochs": "null",
        "train.steps": steps,
        "train.log_every": 1,
        "train.checkpoint_every": 10,
        "optim.warmup_epochs": 0.1,
        "cluster.workers": workers,
        "cluster.threads_per_worker": 1,
    }
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "simclr_ray.cli", "pretrain", str(ROOT / "jobs/fashion_mnist.yaml"), *sets]


def curve(folder: Path) -> list[float]:
    return [record.values["train/loss"] for record in read_jsonl(folder / "metrics.jsonl")]


def killed_once(folder: Path, steps: int) -> None:
    first = subprocess.Popen(command(folder, steps, 1), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(folder.glob("checkpoints/*/COMMIT.json")):
        assert first.poll() is None, "ended before its first checkpoint"
        time.sleep(0.05)
    first.kill()
    first.wait()
    print("killed after", sorted(path.parent.name for path in folder.glob("checkpoints/*/COMMIT.json"))[-1])
    subprocess.run(command(folder, steps, 1), cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for workers in (1, 2, 3):
            subprocess.run(command(place / f"w{workers}", steps, workers), cwd=ROOT, check=True)
        killed_once(place / "killed", steps)
        curves = {name: curve(place / folder) for name, folder in NAMES.items()}
    base = curves["1 worker"]
    print(f"{'step':>4}  " + "  ".join(f"{name:>16}" for name in curves))
    shown = [step for step in range(steps) if step in (0, 1, 2) or (step + 1) % 5 == 0]
    for step in shown:
        print(f"{step + 1:>4}  " + "  ".join(f"{values[step]:>16.7f}" for values in curves.values()))
    largest = {name: max(abs(a / b - 1) for a, b in zip(values, base, strict=True)) for name, values in curves.items()}
    for name, value in largest.items():
        print(f"largest relative difference to 1 worker, {name}: {value:.1e}")
    result = {"machine": machine(), "steps": steps, "largest_relative_difference": largest, "losses": curves}
    (ROOT / "benchmarks/results/world_sizes.json").write_text(json.dumps(result, indent=1) + "\n")


NAMES = {"1 worker": "w1", "2 workers": "w2", "3 workers": "w3", "killed, rerun": "killed"}

if __name__ == "__main__":
    main()
