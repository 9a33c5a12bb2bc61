"""Claim: training of the demo's recipe is faster than with lightly's components, and does not wait for its data.

Both sides train the same encoder and projector from the same initial weights with the same policy, optimizer, learning
rates and global batch, in fp32, on the same two cores: ours by `simclr_ray.pretrain` with all that belongs to it (Ray
Data, Ray Train, records, a checkpoint), the peer by a bare loop around lightly's transform, data set, loss and torch's
DataLoader, as its examples have it (train_lightly.py). Prints tables and writes benchmarks/results/train.json.

    python benchmarks/train.py [--steps 120] [--rounds 2] [--quick]

How: first every way to share two cores is tried for some steps: threads of the encoder, loader workers, processes with
DistributedDataParallel. Then the best of each side take turns. A rate is images a second over the steps after the first
tenth, and before the last ones, for which our stream, which runs ahead, has nothing left to make. Losses are means over
the first and the last tenth: both sides must learn. What other programs took meanwhile is said beside it.

lightly takes part where it can be imported. Its memory format is torch's default, as in its examples; a row of its own
shows what channels_last, which ours has, would give it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from ingest_meter import between, keep_cores, mark
from machine import machine
from train_lightly import EXIT_NOT_INSTALLED, Task, installed

from simclr_ray.config import DataConfig
from simclr_ray.configure import load_config
from simclr_ray.observe.metrics import read_jsonl

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks/results/train.json"
RECIPE = ROOT / "jobs/fashion_mnist.yaml"
CORES = 2
RECORDS = 20
"""Of ours, each over as many steps: the first tenth is two of them."""
BAR, WAIT_BAR = 1.3, 0.03


@dataclass(frozen=True)
class Split:
    """A way to share two cores."""

    side: Literal["ours", "lightly"]
    processes: int
    threads: int
    loaders: int = 0
    """Of each process; ours has Ray's."""
    channels_last: bool = False

    @property
    def name(self) -> str:
        many = f"{self.processes} processes" if self.processes > 1 else "1 process"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.side == "ours":
            return f"{many}, {threads}"
        layout = ", channels_last" if self.channels_last else ""
        return f"{many}, {threads}, {self.loaders} loader{'' if self.loaders == 1 else 's'}{layout}"


OURS = (Split("ours", 1, 2), Split("ours", 1, 1), Split("ours", 2, 1))
LIGHTLY = (
    Split("lightly", 1, 2, 0),
    Split("lightly", 1, 2, 1),
    Split("lightly", 1, 2, 2),
    Split("lightly", 1, 1, 1),
    Split("lightly", 2, 1, 0),
    Split("lightly", 2, 1, 1),
)


@dataclass(frozen=True)
class Run:
    """One training."""

    split: Split
    images_per_s: float
    """Over the steps that count."""
    wait_fraction: float
    """Share of those steps' time in which the trainer had no data."""
    first_loss: float
    last_loss: float
    steps: int
    counted: int
    others_cores: float | None
    """Cores that other programs kept busy, on average over the whole run. None of ours: what Ray's processes took is
    lost with them, for they end with nobody waiting; the runs of the peer in between say whether it was busy."""
    load: float
    """Load average before."""
    whole_s: float
    """From the command to its end, with imports, the start of Ray, and the checkpoint."""


class NotRun(Exception):
    """Why a side cannot take part."""


def overrides(steps: int) -> list[str]:
    """The recipe, for so many steps; both sides get these."""
    return [
        f"data.train={ROOT / 'jobs/data/fashion-mnist/train'}",
        "train.epochs=null",
        f"train.steps={steps}",
        "optim.warmup_epochs=0.25",
    ]


def lead_steps() -> int:
    """How far our stream may run ahead. The recipe lets it be ready before training is, which would hide its work."""
    config = load_config(str(RECIPE))
    units = max(DataConfig().steps_ahead * config.train.global_batch // 64, 4 * config.data.units_per_task)
    return -(-units * 64 // config.train.global_batch)


def run(split: Split, steps: int) -> Run:
    """Train once, in processes of its own."""
    load, before = os.getloadavg()[0], mark(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        step_s, wait_s, losses = (_ours if split.side == "ours" else _lightly)(split, steps, Path(folder))
    usage = between(before, mark(os.getpid()))
    counted = slice(steps // 10, max(steps // 10 + RECORDS, steps - lead_steps()))
    tenth = steps // 10
    batch = load_config(str(RECIPE)).train.global_batch
    seconds = sum(step_s[counted])
    others = None if split.side == "ours" else usage.others_cores
    return Run(
        split, batch * len(step_s[counted]) / seconds, sum(wait_s[counted]) / seconds, mean(losses[:tenth]),
        mean(losses[-tenth:]), steps, len(step_s[counted]), others, load, usage.wall_s,
    )  # fmt: skip


Series = tuple[list[float], list[float], list[float]]
"""Seconds, seconds of waiting, and loss of every step."""


def _ours(split: Split, steps: int, folder: Path) -> Series:
    every = steps // RECORDS
    changes = [
        f"run.folder={folder / 'run'}",
        f"cluster.workers={split.processes}",
        f"cluster.threads_per_worker={split.threads}",
        f"data.steps_ahead={DataConfig().steps_ahead}",
        f"train.log_every={every}",
        f"train.checkpoint_every={steps}",
    ]
    sets = [part for change in [*overrides(steps), *changes] for part in ("--set", change)]
    command = [sys.executable, "-m", "simclr_ray.cli", "pretrain", str(RECIPE), *sets]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pretrain has ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    step_s, wait_s, losses = [], [], []
    for record in read_jsonl(folder / "run/metrics.jsonl"):  # means over the steps since the last one
        step_s += every * [record.values["time/step_s"]]
        wait_s += every * [record.values["data/wait_s"]]
        losses += every * [record.values["train/loss"]]
    return step_s, wait_s, losses


def _lightly(split: Split, steps: int, folder: Path) -> Series:
    ranks = []
    for rank in range(split.processes):
        task = Task(
            str(RECIPE), overrides(steps), rank, split.processes, split.threads, split.loaders, split.channels_last,
            str(folder),
        )  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name("train_lightly.py")), json.dumps(asdict(task))]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate() for process in ranks]
    for process, (_, errors) in zip(ranks, said, strict=True):
        if process.returncode == EXIT_NOT_INSTALLED:
            raise NotRun(errors.strip().splitlines()[-1])
        if process.returncode:
            raise NotRun(f"fails: {errors.strip().splitlines()[-1]}")
    trained = json.loads(said[0][0].splitlines()[-1])
    return trained["step_s"], trained["wait_s"], trained["losses"]


def best_split(splits: tuple[Split, ...], steps: int) -> tuple[Split, list[Run]]:
    """Try all, and take the fastest.

    Raises:
        NotRun: none could run.
    """
    runs: list[Run] = []
    reason = NotRun("nothing to run")
    for split in splits:
        try:
            runs.append(run(split, steps))
        except NotRun as why:
            reason = why
            print(f"  {split.side:<9}{split.name:<48}not run: {why}")
        else:
            show_run(runs[-1])
    if not runs:
        raise reason
    return max(runs, key=lambda one: one.images_per_s).split, runs


HEADS = ("images/s", "data wait", "first loss", "last loss", "whole s", "others", "load")


def show_head(title: str) -> None:
    print(f"\n{title}\n  {'':<57}" + "".join(f"{head:>11}" for head in HEADS))


def show_run(one: Run) -> None:
    cells = (
        f"{one.images_per_s:.0f}", f"{one.wait_fraction:.2%}", f"{one.first_loss:.3f}", f"{one.last_loss:.3f}",
        f"{one.whole_s:.1f}", "-" if one.others_cores is None else f"{one.others_cores:.2f}", f"{one.load:.2f}",
    )  # fmt: skip
    print(f"  {one.split.side:<9}{one.split.name:<48}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def rate(runs: list[Run], split: Split) -> float:
    """Images a second over all runs of a split together."""
    return len(mine := [one.images_per_s for one in runs if one.split == split]) / sum(1 / each for each in mine)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"lightly": installed(), "steps": args.steps, "steps_ahead_not_counted": lead_steps()}
    show_head(f"ways to share {CORES} cores, {args.try_steps} steps each")
    whole = args.try_steps + lead_steps()
    ours, tried = best_split(OURS, whole + -whole % RECORDS)
    entrants = [ours]
    try:
        peer, peers = best_split(LIGHTLY, args.try_steps)
        fast_layout = Split(peer.side, peer.processes, peer.threads, peer.loaders, channels_last=True)
        entrants += [peer, fast_layout]
        tried += peers
    except NotRun as reason:
        result["not_run"] = str(reason)
    result["tried"] = [asdict(one) for one in tried]
    show_head(f"the best of each side, {args.steps} steps, in turns")
    runs = []
    for _ in range(args.rounds):
        for split in entrants:
            runs.append(run(split, args.steps))
            show_run(runs[-1])
        entrants.reverse()  # nobody always follows the same neighbour
    result["runs"] = [asdict(one) for one in runs]
    mine = [one for one in runs if one.split == ours]
    result["images_per_s"] = {f"{split.side}, {split.name}": rate(runs, split) for split in dict.fromkeys(entrants)}
    result["wait_fraction"] = mean(one.wait_fraction for one in mine)
    print(
        f"  ours waits for data {result['wait_fraction']:.2%} of the time" + verdict(result["wait_fraction"] < WAIT_BAR)
    )
    for split in sorted(set(entrants) - {ours}, key=lambda each: each.channels_last):
        ratio = rate(runs, ours) / rate(runs, split)
        result.setdefault("ratio", {})[split.name] = ratio
        print(f"  ours / lightly, {split.name}: {ratio:.2f}" + verdict(ratio >= BAR))
    return result


def verdict(held: bool) -> str:
    return "" if held else ": NOT what is claimed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="a multiple of 20")
    parser.add_argument("--try-steps", type=int, default=40, help="of each way to share the cores; a multiple of 20")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few steps, one round: does it work; see --output")
    parser.add_argument("--output", type=Path, help=f"default {FILE.name} in results; with --quick, none")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.try_steps, args.rounds = 60, 20, 1
    keep_cores(CORES)
    result = compare(args)
    output = args.output or (None if args.quick else FILE)
    if output is not None:
        output.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
