"""Run folders as training leaves them, made by the same functions in milliseconds: settings, records, results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simclr_ray import storage
from simclr_ray.data.manifest import Manifest
from simclr_ray.observe.metrics import JsonlSink, Record
from simclr_ray.train.derive import derive
from simclr_ray.train.run import RunFolder, open_run
from tests.conftest import small_run

NOON = 1_800_000_000.0


def made_run(
    folder: Path, manifest: Manifest, *, steps: int = 6, status: str = "finished",
    evaluation: Mapping[str, Any] | None = None, records: Sequence[Record] | None = None, **changes: Any,
) -> RunFolder:  # fmt: skip
    """A run of `steps` steps, one record each."""
    config = small_run(folder, manifest, **({"train__steps": max(steps, 1), "optim__warmup_epochs": 0} | changes))
    run, _ = open_run(config, derive(config, manifest), manifest.fingerprint)
    run.update(status=status, attempts=1, workers=2)
    sink = JsonlSink(folder / "metrics.jsonl")
    for record in records if records is not None else [record_of(step) for step in range(1, steps + 1)]:
        sink.log(record)
    sink.close()
    if evaluation is not None:
        storage.write_bytes(run.path("eval/results.json"), json.dumps(evaluation).encode())
    return run


def record_of(step: int, *, attempt: int = 1, wall_s: float | None = None, loss: float | None = None) -> Record:
    """A record as rank 0 writes it, 64 images a step and one second each."""
    values = {
        "train/loss": 5 - 0.1 * step if loss is None else loss,
        "train/contrastive_accuracy": 0.1 * min(step, 9),
        "train/positive_similarity": 0.8,
        "train/negative_similarity": 0.0,
        "train/learning_rate": 0.01,
        "train/grad_norm": 2.0,
        "data/wait_fraction": 0.25,
        "data/images_per_s": 64.0,
        "data/rejected_total": 0.0,
        "time/step_s": 1.0,
    }
    return Record(step, 64 * step, attempt, NOON + step if wall_s is None else wall_s, values)


def results(linear: float, *, knn: float = 0.5, test: str = "/data/test") -> dict[str, Any]:
    """As `evaluate` writes them."""
    probe = {"10 labels": {"mean": linear, "spread": None, "values": [linear]}}
    rows = [
        {"name": name, "knn_top1": knn, "linear": probe, "rankme": 9.5, "alignment": 0.2, "uniformity": -1.5,
         "contrastive_accuracy": 0.3}
        for name in ("raw pixels", "trained encoder")
    ]  # fmt: skip
    return {"step": 6, "test": test, "knn_k": 20, "seeds": [0], "rows": rows}


def supervised(values: Sequence[float], *, test: str = "/data/test") -> dict[str, Any]:
    """As the protocols that train with labels write them."""
    row = {"protocol": "finetune", "labels": 1200, "part": "10%", "values": list(values), "seconds": 12.3}
    return {"step": 6, "test": test, "seeds": [0, 1], "rows": [row]}
