"""Claim: training from an object store that goes down in the middle gives the losses of training from a local disk.

    python -m benchmarks.demo_s3 [--steps 120] [--outage-s 10]          or: make demo-s3

Packs the images that come with this repository twice, onto a local disk and into a bucket of a real S3 server
(SeaweedFS) on this machine; trains on both, data and run folder on the bucket the second time; kills the server with
SIGKILL in the middle of that, starts it again after a while; and compares every loss. Ends with status 1 if one
differs. Writes benchmarks/results/demo_s3.json; demo_s3.txt beside it is what a run printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.machine import machine
from simclr_ray import storage
from simclr_ray.observe.metrics import Record, read_jsonl
from tests.servers.seaweed import Seaweed

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "jobs/data/fashion-mnist/train"
RECIPE = ROOT / "jobs/fashion_mnist.yaml"
RESULT = ROOT / "benchmarks/results/demo_s3.json"
CHECKPOINT_EVERY = 20
AHEAD = 40
"""More steps than the stream and the workers hold ready."""


def simclr_ray(*arguments: str) -> None:
    """One verb, as a user would call it; its console is this program's."""
    print(f"\n$ simclr-ray {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "simclr_ray.cli", *arguments], check=True, cwd=ROOT)


def settings(data: str, run: str, steps: int) -> list[str]:
    """The demo's recipe on some data and for so many steps."""
    changes = {
        "data.train": data, "run.folder": run, "train.epochs": "null", "train.steps": steps, "train.log_every": 1,
        "train.checkpoint_every": CHECKPOINT_EVERY, "optim.warmup_epochs": 0.2, "data.steps_ahead": 8,
    }  # fmt: skip
    return [str(RECIPE), *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]


def outage(server: Seaweed, run: str, *, after_step: int, seconds: float, log: list[str], at: list[float]) -> None:
    """Kill the server once a checkpoint of `after_step` is committed, and start it again; note both moments."""
    marker = storage.join(run, "checkpoints", f"step-{after_step:09d}", "COMMIT.json")
    end = time.monotonic() + 600
    while not storage.exists(marker):
        if time.monotonic() > end:
            return
        time.sleep(0.2)
    server.kill()
    at.append(time.time())
    log.append(f"server killed after the checkpoint of step {after_step}")
    print(f"--- {log[-1]}", flush=True)
    time.sleep(seconds)
    server.start()
    at.append(time.time())
    log.append(f"server back after {seconds:.0f} s")
    print(f"--- {log[-1]}", flush=True)


def losses(records: list[Record]) -> dict[int, float]:
    """By step."""
    return {record.step: record.values["train/loss"] for record in records}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--outage-s", type=float, default=10.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server = Seaweed(Path(scratch, "s3"), buckets=("demo",))
        os.environ.update(server.environment())
        server.start()
        try:
            return run(server, Path(scratch), options.steps, options.outage_s)
        finally:
            server.stop()


def run(server: Seaweed, scratch: Path, steps: int, outage_s: float) -> int:
    """The demonstration, with the server running."""
    local, log, at = str(scratch / "local"), list[str](), list[float]()
    simclr_ray("pack", str(IMAGES), f"{local}/train")
    simclr_ray("pack", str(IMAGES), "s3://demo/train")
    simclr_ray("check", *settings("s3://demo/train", "s3://demo/run", steps))
    started = time.monotonic()
    simclr_ray("pretrain", *settings(f"{local}/train", f"{local}/run", steps))
    local_s = time.monotonic() - started
    killer = threading.Thread(
        target=outage, args=(server, "s3://demo/run"), daemon=True,
        kwargs={"after_step": CHECKPOINT_EVERY, "seconds": outage_s, "log": log, "at": at},
    )  # fmt: skip
    killer.start()
    started = time.monotonic()
    simclr_ray("pretrain", *settings("s3://demo/train", "s3://demo/run", steps))
    s3_s = time.monotonic() - started
    killer.join(timeout=60)
    (scratch / "metrics.jsonl").write_bytes(storage.read_bytes("s3://demo/run/metrics.jsonl"))
    ours = losses(read_jsonl(Path(local, "run/metrics.jsonl")))
    records = read_jsonl(scratch / "metrics.jsonl")
    theirs = losses(records)
    equal = sum(ours[step] == theirs.get(step) for step in ours)
    attempts = json.loads(storage.read_bytes("s3://demo/run/run.json"))["attempts"]
    print(f"\nlocal disk: {len(ours)} steps in {local_s:.0f} s; S3: {len(theirs)} steps in {s3_s:.0f} s, {attempts} "
          f"attempt{'s' * (attempts > 1)}; {', '.join(log)}")  # fmt: skip
    print(f"losses equal in every digit: {equal} of {len(ours)}")
    # Without an outage there was nothing to survive: more steps had to come than the stream may be ahead.
    longest = max(b - a for a, b in itertools.pairwise(sorted(record.wall_s for record in records)))
    after = sum(record.wall_s > at[0] for record in records) if at else 0
    happened = len(log) == 2 and after > AHEAD and records[-1].wall_s > at[1]
    result = {
        "machine": machine(), "steps": len(ours), "equal": equal, "local_s": local_s, "s3_s": s3_s,
        "attempts": attempts, "outage": log, "steps_after_the_kill": after, "longest_step_s": longest,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if happened and equal == len(ours) == len(theirs) == steps else 1


if __name__ == "__main__":
    sys.exit(main())
