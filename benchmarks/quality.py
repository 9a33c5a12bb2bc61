"""Claim: what is learned is as good as with lightly's SimCLR at equal images seen, and moves with its settings as the
paper's does.

Both sides train the same encoder and projector from the same initial weights with the same policy, optimizer, learning
rates, global batch and steps: ours by `simclr_ray.pretrain`, the peer by the bare loop around lightly's transform, data
set and loss (train_lightly.py), which sends the two views through the encoder one after the other, as its examples do;
on emoji also in one batch, as ours does, so that batch norm sees the same. On emoji ours is also run on units of 64
images, as large data sets have them: a data set of 1,433 images is packed into smaller ones, and this shows why.
Then one and the same code embeds both and measures them on test images that nothing was trained on: weighted kNN, and a
linear probe whose regularisation is chosen on a hold-out of the training labels. The recipe of Fashion-MNIST is the
demo's, whose learning rate and `zero_init_last` were chosen in short runs of ours on this same test split (README),
which may favour ours there; nothing was chosen for emoji.

    PYTHONPATH=... python benchmarks/quality.py --folder runs/quality [--emoji DATA] [--seeds 3] [--quick]

What is run: Fashion-MNIST (in the clone) and emoji (`simclr-ray fetch-data emoji DATA --source ...`), each side with
each seed, with the untrained encoder and raw pixels beside; then our temperature on Fashion-MNIST and our strength of
colour jitter on emoji, whose shapes stand beside tables 5 and 1 of SimCLR. Every finished cell is a file in --folder;
run again, the script does what is missing, and a training of ours goes on from its checkpoint. Prints tables; a whole
run writes benchmarks/results/quality.json. --quick trains a few steps on one seed and says what the whole would take.

The paper's numbers are ResNet-50 on ImageNet, 100 epochs, batch 4096: the shape can agree, the values cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean

import pyarrow.parquet as pq
import torch
from machine import machine
from quality_tables import PAPER_STRENGTH, PAPER_TEMPERATURE, Cell, Data, Result, Side, show
from safetensors.torch import load_file
from torch import Tensor
from train_lightly import EXIT_NOT_INSTALLED, Task, installed

from simclr_ray.config import Config
from simclr_ray.configure import load_config
from simclr_ray.data.manifest import MANIFEST_NAME, UNIT_ROWS, read_manifest, write_manifest
from simclr_ray.data.shards import ImageRow, write_shard
from simclr_ray.evaluate.encode import Image, LabelledSet, embed, load_encoder, pixels, random_encoder, read_labelled
from simclr_ray.evaluate.knn import knn_top1
from simclr_ray.evaluate.linear import probe_over_seeds
from simclr_ray.observe.metrics import read_jsonl
from simclr_ray.train.build import build_model
from simclr_ray.train.derive import derive, limits_of, policy_of

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks/results/quality.json"
RECIPE = ROOT / "jobs/fashion_mnist.yaml"
QUICK_STEPS, QUICK_LABELS = 20, 1000

TRAINED: tuple[Side, ...] = ("ours", "lightly")

EMOJI = ("views.size=40", "views.grayscale_probability=null", "train.epochs=null", "train.steps=660")
"""What differs from the recipe of Fashion-MNIST: colours, larger pictures, more passes of a set a twelfth as large."""


class NotRun(Exception):
    """Why a side cannot take part."""


@dataclass(frozen=True)
class Places:
    """Where things are."""

    folder: Path
    emoji: Path | None
    steps: int | None
    """Of every training; None: the recipe's."""

    def overrides(self, cell: Cell) -> list[str]:
        """The recipe of a cell; both sides get these."""
        data = ROOT / "jobs/data/fashion-mnist" if cell.data == "fashion-mnist" else self.emoji
        length = ["train.epochs=null", f"train.steps={self.steps}", "optim.warmup_epochs=0.2", "evaluate.seeds=[0]"]
        if cell.data == "fashion-mnist":  # classes of emoji are too unequal for a balanced draw: there all labels serve
            length.append(f"evaluate.num_labels={QUICK_LABELS}")
        return [
            f"data.train={data}/train",
            f"evaluate.test={data}/test",
            f"run.seed={cell.seed}",
            *(EMOJI if cell.data == "emoji" else ()),
            *(length if self.steps is not None else ()),
            *([cell.setting] if cell.setting else []),
        ]


def cells(seeds: int, sweep_seeds: int, *, emoji: bool) -> list[Cell]:
    """Everything that is run, what matters most first."""
    sets: tuple[Data, ...] = ("fashion-mnist", "emoji") if emoji else ("fashion-mnist",)
    out = [Cell(data, "raw pixels", 0) for data in sets]
    for seed in range(seeds):
        for data in sets:
            out += [Cell(data, side, seed) for side in ("random encoder", *TRAINED)]
    if emoji:
        for side in ("lightly, one batch", "ours, units of 64"):
            out += [Cell("emoji", side, seed) for seed in range(seeds)]
    for seed in range(sweep_seeds):
        out += [Cell("fashion-mnist", "ours", seed, f"loss.temperature={value}") for value in PAPER_TEMPERATURE]
        if emoji:
            out += [Cell("emoji", "ours", seed, f"views.strength={value}") for value in PAPER_STRENGTH]
    return out


def run_cell(cell: Cell, places: Places) -> Result:
    """Train and measure, or read what an earlier start has measured.

    Raises:
        NotRun: the side cannot take part.
    """
    done = places.folder / f"{cell.name}.json"
    if done.exists():
        fields = json.loads(done.read_text())
        return Result(**fields | {"cell": Cell(**fields["cell"])})
    config = load_config(str(RECIPE), places.overrides(cell))
    started = time.perf_counter()
    represent, steps, losses, step_s = TRAINERS[cell.side](cell, config, places)
    trained = time.perf_counter()
    train, test = labelled(config.model_dump_json(include={"data", "views", "evaluate", "run"}))
    train_h, test_h = represent(train.views), represent(test.views)
    knn, linear = measured(train_h, train.labels, test_h, test.labels, config)
    tenth = max(1, len(losses) // 10)
    result = Result(
        cell, knn, linear, steps, steps * config.train.global_batch,
        mean(losses[:tenth]) if losses else None, mean(losses[-tenth:]) if losses else None,
        step_s, trained - started, time.perf_counter() - trained,
    )  # fmt: skip
    fresh = done.with_suffix(".tmp")
    fresh.write_text(json.dumps(asdict(result), indent=1))
    fresh.replace(done)
    return result


Represent = Callable[[Image], Tensor]
Made = tuple[Represent, int, list[float], float]
"""What turns images into embeddings, the steps that it was trained for, their losses, and seconds a step."""


def _ours(cell: Cell, config: Config, places: Places) -> Made:
    run = places.folder / "runs" / cell.name
    changes = [*places.overrides(cell), f"run.folder={run}"]
    if cell.side == "ours, units of 64":
        changes.append(f"data.train={in_units_of_64(str(config.data.train), places.folder / 'emoji-64')}")
    sets = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "simclr_ray.cli", "pretrain", str(RECIPE), *sets]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pretrain has ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    encoder = load_encoder(str(run))
    records = read_jsonl(run / "metrics.jsonl")
    losses, last = [record.values["train/loss"] for record in records], records[-1].values["time/step_s"]
    return (lambda views: embed(encoder.model.embed, views, encoder.policy)), encoder.step, losses, last


def in_units_of_64(data: str, to: Path) -> str:
    """The same images in the same order, in units of 64; the folder."""
    if not (to / MANIFEST_NAME).exists():
        manifest = read_manifest(data)
        tables = [pq.read_table(manifest.shard_uri(shard)) for shard in range(len(manifest.table))]
        rows = [ImageRow(row["image"], row["label"], row["uri"]) for table in tables for row in table.to_pylist()]
        shard = write_shard(str(to), 0, rows, UNIT_ROWS)
        write_manifest(replace(manifest, folder=str(to), shards=(shard,), unit_rows=UNIT_ROWS))
    return str(to)


def _lightly(cell: Cell, config: Config, places: Places) -> Made:
    with tempfile.TemporaryDirectory() as folder:
        keep = f"{folder}/model.safetensors"
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        task = Task(
            str(RECIPE), places.overrides(cell), 0, 1, threads, 1, channels_last=True, folder=folder, keep=keep,
            one_batch=cell.side == "lightly, one batch",
        )  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name("train_lightly.py")), json.dumps(asdict(task))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == EXIT_NOT_INSTALLED:
            raise NotRun(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise RuntimeError(f"lightly's loop has ended with {done.returncode}:\n{done.stderr[-2000:]}")
        trained = json.loads(done.stdout.splitlines()[-1])
        model = build_model(config)
        model.load_state_dict(load_file(keep))
    model.eval()
    policy = policy_of(config.views)
    later = mean(trained["step_s"][len(trained["step_s"]) // 2 :])
    return (lambda views: embed(model.embed, views, policy)), len(trained["losses"]), trained["losses"], later


def _random(cell: Cell, config: Config, places: Places) -> Made:
    policy = policy_of(config.views)
    train, _ = labelled(config.model_dump_json(include={"data", "views", "evaluate", "run"}))
    model = random_encoder(config, train.views, policy)
    return (lambda views: embed(model.embed, views, policy)), 0, [], 0.0


def _pixels(cell: Cell, config: Config, places: Places) -> Made:
    policy = policy_of(config.views)
    return (lambda views: pixels(views, policy)), 0, [], 0.0


TRAINERS: dict[Side, Callable[[Cell, Config, Places], Made]] = {
    "ours": _ours, "lightly": _lightly, "lightly, one batch": _lightly, "ours, units of 64": _ours,
    "random encoder": _random, "raw pixels": _pixels,
}  # fmt: skip


@lru_cache(maxsize=2)
def labelled(settings: str) -> tuple[LabelledSet, LabelledSet]:
    """Training and test images with labels, decoded once for all cells that share them."""
    config = load_config(json.loads(settings))
    policy, limits = policy_of(config.views), limits_of(config.data)
    uris = str(config.data.train), str(config.evaluate.test)
    train, test = (read_labelled(read_manifest(uri), policy, limits, num_pairs=0, seed=0) for uri in uris)
    return train, test


def measured(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, config: Config) -> tuple[float, float]:
    """kNN and linear accuracy on the test set, the same code for all sides."""
    choose = config.evaluate
    knn = knn_top1(train_h, train_y, test_h, test_y, k=choose.knn_k, temperature=choose.knn_temperature)
    some = None if choose.num_labels is None or choose.num_labels >= len(train_h) else choose.num_labels
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    probe = probe_over_seeds(
        train_h, train_y, test_h, test_y, num_classes=num_classes, seeds=choose.seeds, num_labels=some
    )
    return knn, probe.mean


def whole_hours(results: Sequence[Result], everything: Sequence[Cell], places: Places) -> float:
    """Hours that the whole would take, by what a start, a step and a measurement took in the quick cells.

    A probe's time is taken to grow with its labels, which is more than it does.
    """
    seconds = 0.0
    for cell in everything:
        like = [r for r in results if (r.cell.data, r.cell.side) == (cell.data, cell.side)]
        if not like:
            continue
        config = load_config(str(RECIPE), Places(places.folder, places.emoji, None).overrides(cell))
        steps = derive(config, read_manifest(str(config.data.train))).total_steps if like[0].steps else 0
        start = max(0.0, like[0].train_s - like[0].steps * like[0].step_s)
        more = (config.evaluate.num_labels or QUICK_LABELS) / QUICK_LABELS if cell.data == "fashion-mnist" else 1.0
        probes = more * len(config.evaluate.seeds)
        seconds += like[0].measure_s * probes + start + steps * like[0].step_s
    return seconds / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for finished cells and runs; the same folder goes on")
    parser.add_argument("--emoji", type=Path, help="packed emoji: a folder with train/ and test/")
    parser.add_argument("--seeds", type=int, default=3, help="of each side (default: %(default)s)")
    parser.add_argument("--sweep-seeds", type=int, default=2, help="of each value of a sweep (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed: does it work, how long is the whole")
    parser.add_argument("--output", type=Path, help=f"default {FILE.name} in results; with --quick, none")
    args = parser.parse_args()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    everything = cells(args.seeds, args.sweep_seeds, emoji=args.emoji is not None)
    if args.emoji is None:
        print("emoji: not run, no --emoji")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.quick:
            folder = folder / "quick"
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        places = Places(folder.absolute(), args.emoji and args.emoji.absolute(), QUICK_STEPS if args.quick else None)
        todo = [cell for cell in everything if not args.quick or (cell.seed == 0 and _is_quick(cell))]
        results, not_run = [], {}
        for cell in todo:
            try:
                results.append(run_cell(cell, places))
            except NotRun as reason:
                not_run[cell.side] = str(reason)
                continue
            one = results[-1]
            print(f"{cell.name}: kNN {one.knn:.1%}, linear {one.linear:.1%}, {one.train_s:.0f} s", flush=True)
        said = show(results)
        for side, why in not_run.items():
            print(f"{side}: not run, {why}")
        if args.quick:
            hours = whole_hours(results, everything, places)
            print(
                f"\nthe whole, {len(everything)} cells, would take about {hours:.1f} h on a machine as busy as this was"
            )
    output = args.output or (None if args.quick else FILE)
    if output is not None:
        about = {"machine": machine(), "lightly": installed(), "seeds": args.seeds, "not_run": not_run}
        output.write_text(json.dumps({**about, **said, "cells": [asdict(r) for r in results]}, indent=1) + "\n")


def _is_quick(cell: Cell) -> bool:
    """A quick run has each side once, and two values of each sweep."""
    return cell.setting in ("", "loss.temperature=0.1", "loss.temperature=1.0", "views.strength=1.0")


if __name__ == "__main__":
    main()
