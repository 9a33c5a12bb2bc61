"""A search over temperature and jitter strength on the images that come with the clone, and what it costs.

    python -m benchmarks.search [FOLDER]

Runs `simclr-ray tune` on a grid whose ends are known to be worse (a temperature too low or too high, no jitter), trains
the finalists again, and measures what the search costs beside the trainings themselves: its wall time, against the
seconds that the same trials take one after another by `simclr-ray pretrain`. Writes results/search.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import machine
from simclr_ray.search.finalists import verdict
from simclr_ray.search.results import label_free_lines, ranked
from simclr_ray.search.tune import tune

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "jobs" / "fashion_mnist.yaml"
OVERRIDES = ["train.epochs=2", "cluster.workers=1", "data.steps_ahead=16", "train.checkpoint_every=1000"]
SPACE = {
    "space": {
        "loss.temperature": {"grid": [0.02, 0.1, 0.5, 2.0]},
        "views.strength": {"grid": [0.0, 0.5]},
    },
    "searcher": "grid",
    "objective": {"every": 32, "images": 1024, "voters": 4096, "views": 4},
    "finalists": 2,
    "seeds": 3,
}


def main(folder: Path) -> None:
    """Measure, print and keep."""
    began = time.monotonic()
    found = tune(RECIPE, {**SPACE, "finalists": 0}, str(folder / "search"), OVERRIDES)
    search_s = time.monotonic() - began
    alone_s = sum(train_alone(folder, number, dict(one.settings)) for number, one in enumerate(found.trials[:2])) / 2
    again = tune(RECIPE, SPACE, str(folder / "with-finalists"), OVERRIDES)
    result = {
        "machine": machine(),
        "trials": [
            {"settings": dict(one.settings), "measures": dict(one.scores[-1].measures)}
            for one in ranked(found.trials, found.measure)
            if one.scores
        ],
        "search_s": round(search_s, 1),
        "one_training_alone_s": round(alone_s, 1),
        "search_over_trainings": round(search_s / (alone_s * len(found.trials)), 3),
        "label_free": label_free_lines(found.trials),
        "finalists": [
            {"name": one.name, "settings": dict(one.settings), "mean": one.mean, "spread": one.spread}
            for one in again.finalists
        ],
        "verdict": verdict(again.finalists),
    }
    text = json.dumps(result, indent=1)
    (ROOT / "benchmarks" / "results" / "search.json").write_text(text + "\n")
    print(text)


def train_alone(folder: Path, number: int, settings: dict[str, object]) -> float:
    """Seconds of one training as its own command, start of Ray included."""
    folder_of = f"run.folder={folder / f'alone-{number}'}"
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "simclr_ray.cli", "pretrain", str(RECIPE)]
        + [part for text in (*OVERRIDES, *given, folder_of) for part in ("--set", text)],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return time.monotonic() - began


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
