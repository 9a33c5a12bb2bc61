"""Claim: a job on several hosts that come, are cut off, come back and stop ends with the losses of an undisturbed one.

    sudo python -m benchmarks.rehearsal [--steps 400]

Five hosts on this machine, network namespaces with addresses of their own on one switch (tests/servers/hosts.py): a
head that runs no work, a node that trains, one that trains too and joins later, one that makes views, and an S3 server.
Ray asks for a token; it is started by `ray start` on each host, as on real ones; gloo and all else go from host to
host. The job is sent from outside, by `simclr-ray submit`, twice:

twin       one worker, undisturbed
rehearsal  up to two workers: a host joins and the group grows; its cable is drawn; it joins again; it is stopped, with
           every process as it stands

Every loss is compared: the first ten to 1e-5, all to 1e-3, for rounding differs where the number of workers does.
Prints what happens and when, writes benchmarks/results/rehearsal.json, ends with 1 if a loss differs. Linux
alone; needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine
from simclr_ray import storage
from simclr_ray.configure import to_yaml
from simclr_ray.data.manifest import Manifest
from simclr_ray.observe.metrics import Record, parse_jsonl
from simclr_ray.train.checkpoint import committed_steps
from tests.conftest import make_data_set, real_rows, small_run
from tests.faults.commands import wait_for
from tests.servers.hosts import INTERFACE, Host, hosts, why_not
from tests.servers.ray_head import authentication, clean_environment, end, wait_for_jobs
from tests.servers.seaweed import Seaweed

RESULT = Path(__file__).parent / "results/rehearsal.json"
GCS, DASHBOARD = 6379, 8265
NAMES = ("head", "train-1", "train-2", "data-1", "store")
IMAGES = 4096
CHECKPOINT_EVERY = 20
PATIENCE_S = 300.0
QUICK = {
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
"""A host that is silent for some seconds is lost; Ray's own default is half a minute."""


class Cluster:
    """Ray on the hosts, each started by `ray start` there."""

    def __init__(self, net: dict[str, Host], folder: Path, environment: dict[str, str]) -> None:
        self._net, self._folder = net, folder
        self.environment = clean_environment() | authentication(folder, secrets.token_hex(16)) | environment
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def dashboard(self) -> str:
        """Of the jobs API."""
        return f"http://{self._net['head'].address}:{DASHBOARD}"

    def start_head(self) -> None:
        """A head without a CPU for work."""
        address = self._net["head"].address
        self._start("head", "--head", f"--port={GCS}", f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD}",
                    "--num-cpus=0", f"--temp-dir={self._folder / 'ray'}")  # fmt: skip
        wait_for_jobs(f"{self.dashboard}/api/jobs/", self._started["head"], self._folder / "head.log")

    def start(self, name: str) -> None:
        """A node of one CPU, with its role as a label."""
        role = name.partition("-")[0]
        self._start(name, f"--address={self._net['head'].address}:{GCS}", "--num-cpus=1", f"--labels=role={role}")

    def freeze(self, name: str) -> None:
        """Stop every process of a host as it stands."""
        for process in self._net[name].processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)

    def lose(self, name: str) -> None:
        """End what is left of a host."""
        self._net[name].power_off()
        self._started.pop(name).wait()

    def stop(self) -> None:
        """End all, the head last."""
        for process in reversed(self._started.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
            end(process)

    def _start(self, name: str, *arguments: str) -> None:
        host = self._net[name]
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host.address}",
            "--object-store-memory=300000000", "--disable-usage-stats", *arguments,
        ]  # fmt: skip
        # Of a host's name, gloo would take the address of this machine.
        environment = self.environment | QUICK | {"GLOO_SOCKET_IFNAME": INTERFACE}
        with (self._folder / f"{name}.log").open("ab") as log:
            self._started[name] = subprocess.Popen(
                host.command(command), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )


class Rehearsal:
    """Jobs on such a cluster, and what happened in them."""

    def __init__(self, cluster: Cluster, folder: Path, steps: int) -> None:
        self.cluster, self._folder, self._steps = cluster, folder, steps
        self._began = time.monotonic()
        self.told: list[str] = []

    def say(self, text: str) -> None:
        """Print it with the seconds since the beginning, and keep it."""
        self.told.append(f"{time.monotonic() - self._began:6.1f} s  {text}")
        print(self.told[-1], flush=True)

    def config(self, name: str, manifest: Manifest, **changes: Any) -> Path:
        """A run on the bucket: training and views on the hosts of their roles."""
        values = {
            "data__train": "s3://train/images", "run__folder": f"s3://runs/{name}", "views__size": 28,
            "train__global_batch": 256, "train__steps": self._steps, "train__checkpoint_every": CHECKPOINT_EVERY,
            "cluster__train_labels": {"role": "train"}, "cluster__data_labels": {"role": "data"},
            "cluster__start_timeout_s": 60.0, "cluster__resize_check_s": 5.0, "cluster__max_failures": 8,
        }  # fmt: skip
        file = self._folder / f"{name}.yaml"
        config = small_run(self._folder / "unused", manifest, **(values | changes))
        file.write_text(to_yaml(config.model_dump(mode="json")))
        return file

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`simclr-ray` from outside the cluster."""
        return subprocess.run(
            [sys.executable, "-m", "simclr_ray.cli", *map(str, arguments), "--address", self.cluster.dashboard],
            env=self.cluster.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def submit(self, name: str, manifest: Manifest, **changes: Any) -> None:
        """Send a job and leave it to itself."""
        done = self.command("submit", "pretrain", self.config(name, manifest, **changes), "--id", name, "--detach")
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


def disturbed(do: Rehearsal, net: dict[str, Host], manifest: Manifest) -> dict[str, float]:
    """The run whose second host comes, is cut off, comes back and is stopped; seconds until it went on each time."""
    cluster, name, found = do.cluster, "rehearsal", dict[str, float]()
    do.submit(name, manifest, cluster__workers=2, cluster__min_workers=1)
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


def compared(ours: list[Record], twin: list[Record], steps: int) -> dict[str, Any]:
    """Whether every step is there once and its loss is the twin's."""
    a, b = ([record.values["train/loss"] for record in records] for records in (ours, twin))
    once = all([record.step for record in records] == list(range(1, steps + 1)) for records in (ours, twin))
    apart = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=False)]
    same = once and max(apart[:10]) < 1e-5 and max(apart) < 1e-3
    return {"steps": len(a), "each_once": once, "largest_of_ten": max(apart[:10]), "largest": max(apart), "same": same}


@contextlib.contextmanager
def ready() -> Iterator[tuple[Rehearsal, dict[str, Host], Manifest]]:
    """Hosts, store, images in it, and a cluster of a head, a host that trains and one that makes views."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of both runs (default: %(default)s)")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory(prefix="rr", ignore_cleanup_errors=True) as scratch, hosts(*NAMES) as net:
        folder = Path(scratch)
        server = Seaweed(folder / "s3", host=net["store"])
        os.environ.update(server.environment())
        server.start()
        cluster = Cluster(net, folder, server.environment())
        try:
            manifest = make_data_set(folder / "images", real_rows(IMAGES), unit_rows=64, shard_rows=1024)
            for file in sorted((folder / "images").iterdir()):
                storage.write_bytes(f"s3://train/images/{file.name}", file.read_bytes())
            do = Rehearsal(cluster, folder, steps)
            cluster.start_head()
            for name in ("train-1", "data-1"):
                cluster.start(name)
            do.say("head, train-1, data-1: started, and ask for a token")
            yield do, net, manifest
        finally:
            cluster.stop()
            server.stop()


def main() -> int:
    if (reason := why_not()) is not None:
        print(f"not here: {reason}")
        return 2
    with ready() as (do, net, manifest):
        do.submit("twin", manifest, cluster__workers=1)
        do.wait("twin")
        seconds = disturbed(do, net, manifest)
        losses = compared(records_of("rehearsal"), records_of("twin"), do._steps)
        do.say(f"losses: {losses}")
    result = {"machine": machine(), "told": do.told, "seconds": seconds, "losses": losses}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if losses["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
