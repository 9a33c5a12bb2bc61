"""Claims: a job on several hosts that come, are cut off, come back and stop ends with the losses of an undisturbed
one; and a host more for making views raises the images a second of a job that runs.

    sudo python -m benchmarks.rehearsal [--part losses|planes ...] [--steps 200]

Six hosts on this machine, network namespaces with addresses of their own on one switch (tests/servers/hosts.py): a head
that runs no work, two that train, two that make views, and an S3 server; some are started later. Ray asks for a token;
it is started by `ray start` on each host, as on real ones; gloo and all else go from host to host. The jobs are sent
from outside, by `simclr-ray submit`:

twin       one worker, undisturbed
rehearsal  up to two workers: a host joins and the group grows; its cable is drawn; it joins again; it is stopped, with
           every process as it stands
planes     photographs, whose decoding costs more than the training: one host makes views, then another joins

Every loss of the first two is compared: the first ten to 1e-5, all to 1e-3, for rounding differs where the number of
workers does. All hosts share the cores of this machine, so of the third only a part of the doubling can be seen.
Prints what happens and when, writes benchmarks/results/rehearsal.json, ends with 1 if a claim does not hold or was left
out. Linux alone; needs root, and for the third job photographs (views_photos.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import machine
from benchmarks.rehearsal_hosts import Cluster
from benchmarks.views_photos import Case, encoded_crops, find_photos
from simclr_ray import storage
from simclr_ray.configure import to_yaml
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.shards import ImageRow
from simclr_ray.observe.metrics import Record, parse_jsonl
from simclr_ray.train.checkpoint import committed_steps
from tests.conftest import make_data_set, real_rows, small_run
from tests.faults.commands import wait_for
from tests.servers.hosts import Host, hosts, why_not
from tests.servers.seaweed import Seaweed

RESULT = Path(__file__).parent / "results/rehearsal.json"
NAMES = ("head", "train-1", "train-2", "data-1", "data-2", "store")
PARTS = ("losses", "planes")
IMAGES, PHOTOS = 4096, 256
CHECKPOINT_EVERY = 20
PATIENCE_S = 300.0
MORE = 1.2
"""A second host must bring at least so many times the images a second."""
PHOTO = Case("large", 2048, 1536, 0, 90, "cifar", 16)
PLANES = {
    "data__train": "s3://train/photos", "data__units_per_task": 1, "views__size": 16, "views__scaled_decode": False,
    "train__global_batch": 64, "train__steps": 180,
}  # fmt: skip
"""Whole photographs are decoded for views of 16 pixels: dear to make and cheap to train on."""


class Rehearsal:
    """Jobs on such a cluster, and what happened in them."""

    def __init__(self, cluster: Cluster, folder: Path, steps: int, manifest: Manifest) -> None:
        self.cluster, self._folder, self._steps, self._manifest = cluster, folder, steps, manifest
        self._began = time.monotonic()
        self.told: list[str] = []

    def say(self, text: str) -> None:
        """Print it with the seconds since the beginning, and keep it."""
        self.told.append(f"{time.monotonic() - self._began:6.1f} s  {text}")
        print(self.told[-1], flush=True)

    def config(self, name: str, **changes: Any) -> Path:
        """A run on the bucket: training and views on the hosts of their roles."""
        values = {
            "data__train": "s3://train/images", "run__folder": f"s3://runs/{name}", "views__size": 28,
            "train__global_batch": 256, "train__steps": self._steps, "train__checkpoint_every": CHECKPOINT_EVERY,
            "cluster__train_labels": {"role": "train"}, "cluster__data_labels": {"role": "data"},
            "cluster__start_timeout_s": 60.0, "cluster__resize_check_s": 5.0, "cluster__max_failures": 8,
        }  # fmt: skip
        file = self._folder / f"{name}.yaml"
        file.write_text(
            to_yaml(small_run(self._folder / "unused", self._manifest, **(values | changes)).model_dump(mode="json"))
        )
        return file

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`simclr-ray` from outside the cluster."""
        return subprocess.run(
            [sys.executable, "-m", "simclr_ray.cli", *map(str, arguments), "--address", self.cluster.dashboard],
            env=self.cluster.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def submit(self, name: str, **changes: Any) -> None:
        """Send a job and leave it to itself."""
        done = self.command("submit", "pretrain", self.config(name, **changes), "--id", name, "--detach")
        assert done.returncode == 0, done.stdout + done.stderr
        self.say(f"{name}: sent from outside")

    def wait(self, name: str) -> None:
        """Until the job ends, well."""
        done = self.command("jobs", "logs", name, "--follow")
        status = self.command("jobs", "status", name).stdout
        assert "SUCCEEDED" in status or "succeeded" in status, status + done.stdout[-6000:] + done.stderr[-2000:]
        self.say(f"{name}: ended well")

    def until(self, what: str, condition: Callable[[], bool]) -> float:
        """Wait for something, and say how long it took."""
        started = time.monotonic()
        wait_for(condition, timeout_s=PATIENCE_S)
        seconds = time.monotonic() - started
        self.say(f"{what} (after {seconds:.1f} s)")
        return seconds


def steps_of(name: str) -> int:
    """Of the newest checkpoint."""
    return max(committed_steps(f"s3://runs/{name}/checkpoints"), default=0)


def attempts_of(name: str) -> int:
    try:
        return int(json.loads(storage.read_bytes(f"s3://runs/{name}/run.json")).get("attempts", 0))
    except FileNotFoundError:
        return 0


def records_of(name: str) -> list[Record]:
    uri = f"s3://runs/{name}/metrics.jsonl"
    return parse_jsonl(storage.read_bytes(uri), where=uri)


def goes_on(name: str) -> Callable[[], bool]:
    """Whether another attempt has begun since, and made a checkpoint of its own."""
    attempt, step = attempts_of(name), steps_of(name)
    return lambda: attempts_of(name) > attempt and steps_of(name) > step


def disturbed(do: Rehearsal, net: dict[str, Host]) -> dict[str, float]:
    """The run whose second host comes, is cut off, comes back and is stopped; seconds until it went on each time."""
    cluster, name, found = do.cluster, "rehearsal", dict[str, float]()
    do.submit(name, cluster__workers=2, cluster__min_workers=1)
    do.until("first checkpoint, one worker", lambda: steps_of(name) > 0)
    more = goes_on(name)
    cluster.start("train-2")
    do.say("train-2: started")
    found["grown_s"] = do.until("grown to two workers, next checkpoint", more)
    more = goes_on(name)
    net["train-2"].cut()
    do.say("train-2: cut off")
    found["cut_s"] = do.until("went on with one, next checkpoint", more)
    cluster.lose("train-2")
    net["train-2"].plug()
    more = goes_on(name)
    cluster.start("train-2")
    do.say("train-2: cable back, started again")
    found["regrown_s"] = do.until("grown to two again, next checkpoint", more)
    more = goes_on(name)
    cluster.freeze("train-2")
    do.say("train-2: every process stopped")
    found["stopped_s"] = do.until("went on with one, next checkpoint", more)
    do.wait(name)
    found["attempts"] = attempts_of(name)
    return found


def widened(do: Rehearsal) -> dict[str, float]:
    """Images a second of a job before and after a second host makes views."""
    name = "planes"
    do.submit(name, cluster__workers=1, **PLANES)
    do.until("eighty steps with one host for views", lambda: steps_of(name) >= 80)
    joined = time.time()
    do.cluster.start("data-2")
    do.say("data-2: started")
    do.wait(name)
    records = [record for record in records_of(name) if record.step > CHECKPOINT_EVERY]
    early = [record for record in records if record.wall_s < joined]
    late = [record for record in records if record.step > records[-1].step - 60]
    found = {}
    for which, those in (("one_host", early), ("two_hosts", late)):
        first, last = those[0], those[-1]
        found[which] = (last.samples_seen - first.samples_seen) / (last.wall_s - first.wall_s)
        found[f"waited_{which}"] = mean(one.values["data/wait_fraction"] for one in those)
    found["ratio"] = found["two_hosts"] / found["one_host"]
    do.say(f"images a second: {found['one_host']:.0f} with one host, {found['two_hosts']:.0f} with two")
    return found


def compared(ours: list[Record], twin: list[Record], steps: int) -> dict[str, Any]:
    """Whether every step is there once and its loss is the twin's."""
    a, b = ([record.values["train/loss"] for record in records] for records in (ours, twin))
    once = all([record.step for record in records] == list(range(1, steps + 1)) for records in (ours, twin))
    apart = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=False)]
    same = once and max(apart[:10]) < 1e-5 and max(apart) < 1e-3
    return {"steps": len(a), "each_once": once, "largest_of_ten": max(apart[:10]), "largest": max(apart), "same": same}


def store(name: str, folder: Path, rows: list[ImageRow], unit_rows: int) -> Manifest:
    """Pack images, also into the bucket."""
    manifest = make_data_set(folder, rows, unit_rows=unit_rows, shard_rows=16 * unit_rows)
    for file in sorted(folder.iterdir()):
        storage.write_bytes(f"s3://train/{name}/{file.name}", file.read_bytes())
    return manifest


def photographs() -> list[ImageRow] | None:
    """Crops of photographs; None, having said why, where none are installed."""
    try:
        photos = find_photos(None)
    except SystemExit as reason:
        print(f"planes: left out: {reason}")
        return None
    if not any(photo.width >= PHOTO.width and photo.height >= PHOTO.height for photo in photos.images):
        print(f"planes: left out: no photograph has {PHOTO.width} x {PHOTO.height} pixels")
        return None
    crops = encoded_crops(photos, PHOTO, PHOTOS)
    return [ImageRow(crop, None, f"photo-{number}.jpg") for number, crop in enumerate(crops)]


@contextlib.contextmanager
def ready(steps: int, photos: list[ImageRow] | None) -> Iterator[tuple[Rehearsal, dict[str, Host]]]:
    """Hosts, store, images in it, and a cluster of a head, a host that trains and one that makes views."""
    with tempfile.TemporaryDirectory(prefix="rr", ignore_cleanup_errors=True) as scratch, hosts(*NAMES) as net:
        folder = Path(scratch)
        server = Seaweed(folder / "s3", host=net["store"])
        os.environ.update(server.environment())
        server.start()
        cluster = Cluster(net, folder, server.environment())
        try:
            manifest = store("images", folder / "images", real_rows(IMAGES), 64)
            if photos:
                store("photos", folder / "photos", photos, 16)
            do = Rehearsal(cluster, folder, steps, manifest)
            cluster.start_head()
            for name in ("train-1", "data-1"):
                cluster.start(name)
            do.say("head, train-1, data-1: started, and ask for a token")
            yield do, net
        finally:
            cluster.stop()
            server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    parser.add_argument("--steps", type=int, default=200, help="of the first two runs (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: benchmarks/results/rehearsal.json")
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"not here: {reason}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts go in this case too
    photos = photographs() if "planes" in args.part else None
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    with ready(args.steps, photos) as (do, net):
        if "losses" in args.part:
            do.submit("twin", cluster__workers=1)
            do.wait("twin")
            seconds = disturbed(do, net)
            losses = compared(records_of("rehearsal"), records_of("twin"), args.steps)
            do.say(f"losses: {losses}")
            found["losses"] = {"machine": machine(), "told": list(do.told), "seconds": seconds} | losses
        if photos:
            before = len(do.told)
            planes = widened(do)
            found["planes"] = {"machine": machine(), "told": do.told[before:]} | planes
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    held = [found["losses"]["same"]] if "losses" in args.part else []
    held += [found["planes"]["ratio"] > MORE] if photos else []
    return 0 if all(held) and len(held) == len(args.part) else 1


if __name__ == "__main__":
    sys.exit(main())
