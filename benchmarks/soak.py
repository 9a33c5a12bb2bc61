"""Claim: whatever is killed, stopped or cut off, and whenever, a run ends with the losses of the undisturbed one.

    python -m benchmarks.soak [--minutes 30] [--seed 0] [--steps 600] [--life 0.25]

Runs the command `simclr-ray pretrain` over images and, every other time, a run folder on a real S3 server behind a
proxy, and lets faults happen at random moments, all drawn from the seed: train workers, any other process of Ray and
the driver are killed or stopped, for a while or for good; Ctrl-C and SIGTERM; the store is killed or falls silent; its
answers are refused, reset, cut, shortened, changed, lost or late; a bit of the newest checkpoint flips between two
commands; some commands run again with another number of workers. What ended is run again until it ends with 0.

Then, for each run: losses of all steps, each once, equal to the twin's in every digit, or within --tolerance where the
number of workers changed; no lock, no process, no shared memory left. A last part, a quarter of the time, is a single
life of a driver whose workers are killed again and again: neither its memory nor its files nor the number of processes
may grow.

Prints what happened and writes benchmarks/results/soak.json; ends with status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import soak_faults as faults
from benchmarks.machine import machine
from benchmarks.soak_faults import MARK, Target, marked, train_workers
from simclr_ray import storage
from simclr_ray.data.manifest import Manifest
from simclr_ray.observe.metrics import read_jsonl
from tests.conftest import make_data_set, real_rows
from tests.faults.commands import program, recipe
from tests.servers.proxy import Proxy
from tests.servers.seaweed import Seaweed

RESULT = Path(__file__).parent / "results/soak.json"
CHECKPOINT_EVERY = 25
MOST_COMMANDS = 40
"""Of one run; one that needs more makes no progress."""
GROWTH = {"memory_mb": 150, "files": 40, "processes": 2}
"""Of the whole tree of one driver, allowed between the first and the last third of its life."""


@dataclass
class Round:
    """One run, over all its commands."""

    workers: list[int]
    """Of each command."""
    on_s3: bool
    happened: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    attempts: int = 0
    seconds: float = 0.0
    largest_difference: float = 0.0
    """Relative, to the twin's losses."""
    equal: int = 0
    broken: list[str] = field(default_factory=list)
    """Promises."""


class Soak:
    """What all rounds share."""

    def __init__(self, options: argparse.Namespace, scratch: Path, server: Seaweed, proxy: Proxy) -> None:
        self.options, self.scratch, self.server, self.proxy = options, scratch, server, proxy
        self.random = random.Random(options.seed)
        self.data = make_data_set(scratch / "data", real_rows(400))
        for file in sorted((scratch / "data").iterdir()):
            storage.write_bytes(f"s3://train/data/{file.name}", file.read_bytes())
        self.twins = {workers: self.twin(workers) for workers in (1, 2)}

    def recipe(self, folder: Path, uri: str, data: str, workers: int, **changes: Any) -> Path:
        """One run's settings; little patience, and no limit on restarts."""
        manifest = Manifest(data, self.data.shards, unit_rows=self.data.unit_rows)
        settings = {
            "run__folder": uri, "train__steps": self.options.steps, "train__checkpoint_every": CHECKPOINT_EVERY,
            "cluster__workers": workers, "cluster__max_failures": 1000, "cluster__collective_timeout_s": 8,
            "cluster__first_step_timeout_s": 60, "storage__read_timeout_s": 5, "storage__deadline_s": 60,
            "storage__endpoint": self.proxy.endpoint, "train__max_failed_saves": 20,
            "data__steps_ahead": 2, "data__prefetch_units": 2,
        }  # fmt: skip
        return recipe(folder, manifest, **(settings | changes))

    def twin(self, workers: int) -> dict[int, float]:
        """Losses of the run that nothing happens to."""
        folder = self.scratch / f"twin-{workers}"
        file = self.recipe(folder, str(folder), str(self.scratch / "data"), workers)
        with command(file, str(uuid.uuid4())) as process:
            output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        return losses(str(folder), self.scratch)

    def round(self, number: int) -> Round:
        """One run to its end, and what is wrong with it."""
        self.random = draw = random.Random(f"{self.options.seed} {number}")
        started, on_s3 = time.monotonic(), number % 2 == 1
        folder = self.scratch / f"run-{number}"
        uri = f"s3://train/run-{number}" if on_s3 else str(folder)
        data = "s3://train/data" if draw.random() < 0.7 else str(self.scratch / "data")
        this = Round([draw.choice((1, 2))], on_s3)
        until = time.monotonic() + draw.uniform(20, 90)
        while len(this.codes) < MOST_COMMANDS:
            file = self.recipe(folder, uri, data, this.workers[-1])
            if self.command(file, this, until) == 0:
                break
            if not on_s3 and draw.random() < 0.3:
                this.happened += [text for text in [faults.damage(folder, draw)] if text]
            this.workers.append(draw.choice((1, 2)) if draw.random() < 0.3 else this.workers[-1])
        this.seconds = time.monotonic() - started
        self.check(this, uri)
        return this

    def command(self, file: Path, this: Round, until: float) -> int:
        """One command to its end, disturbed as long as `until` has not come."""
        mark, memory = str(uuid.uuid4()), faults.shared_memory_bytes()
        self.proxy.clear()
        with command(file, mark) as process:
            target = Target(process, mark, self.server, self.proxy, self.random)
            lines: list[str] = []
            reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
            reader.start()
            while process.poll() is None and time.monotonic() < until:
                pause = self.random.uniform(0.5, 12.0)
                if not waited(process, pause):
                    faults.happen(target)
            if not waited(process, 600):
                this.broken.append(f"hung: no end 600 s after the last fault ({target.notes})")
                process.kill()
            code = process.wait()
            reader.join(30)
        this.codes.append(code)
        this.happened += target.notes
        allowed = {0, 5}
        if target.control_plane_killed:
            allowed |= {1, -6, -9, -15, 4}
        if "driver killed" in target.notes:
            allowed.add(-9)
        if {"Ctrl-C", "SIGTERM"} & set(target.notes):
            allowed |= {130, -15}
        if code not in allowed:
            this.broken.append(f"exit code {code} after {target.notes}: {''.join(lines[-12:])}")
        self.left_over(mark, memory, this)
        return code

    def left_over(self, mark: str, memory: int, this: Round) -> None:
        """Nothing of a command may outlive it for long."""
        end = time.monotonic() + 120  # Ray's agents look for their raylet now and then
        while (still := marked(mark)) and time.monotonic() < end:
            time.sleep(0.5)
        if still:
            this.broken.append(f"left over: {[faults.title(one) for one in still]} after {this.happened[-3:]}")
            for one in still:
                kill(one)
        grown = faults.shared_memory_bytes() - memory
        if grown > 64 << 20:
            this.broken.append(f"{grown >> 20} MiB left in shared memory")

    def check(self, this: Round, uri: str) -> None:
        """The promises, after a run has ended with 0."""
        if not this.codes or this.codes[-1] != 0:
            this.broken.append(f"no end after {len(this.codes)} commands")
            return
        info = json.loads(storage.read_bytes(storage.join(uri, "run.json")))
        this.attempts = int(info["attempts"])
        if info["status"] != "finished":
            this.broken.append(f"run.json says {info['status']}")
        if storage.exists(storage.join(uri, "lock.json")):
            this.broken.append("the lock is still there")
        if storage.exists(storage.join(uri, "quarantine.parquet")):
            this.broken.append("images were rejected that are good")
        found, twin = losses(uri, self.scratch), self.twins[this.workers[0]]
        if sorted(found) != sorted(twin):
            this.broken.append(f"steps {sorted(set(twin) ^ set(found))[:5]} are missing or too many")
            return
        this.equal = sum(found[step] == twin[step] for step in twin)
        this.largest_difference = max(abs(found[step] / twin[step] - 1) for step in twin)
        same = len(set(this.workers)) == 1
        if (same and this.equal < len(twin)) or this.largest_difference > self.options.tolerance:
            first = min(step for step in twin if found[step] != twin[step])
            this.broken.append(f"losses differ from step {first} on, by {this.largest_difference:.1e} at most")

    def long_life(self, minutes: float) -> dict[str, Any]:
        """One driver whose workers die again and again: nothing may grow."""
        folder, mark = self.scratch / "long", str(uuid.uuid4())
        file = self.recipe(
            folder, str(folder), "s3://train/data", 1, train__steps=10_000_000, optim__warmup_epochs=10,
            train__keep_checkpoints=2, train__checkpoint_every=200, train__log_every=50,
        )  # fmt: skip
        samples: list[Sizes] = []
        memory = faults.shared_memory_bytes()
        kills, end = 0, time.monotonic() + 60 * minutes
        with command(file, mark) as process:
            threading.Thread(target=lambda: list(process.stdout or ()), daemon=True).start()
            waited(process, 30)
            while process.poll() is None and time.monotonic() < end:
                waited(process, 12)
                samples.append(sizes(mark))
                for worker in train_workers(mark)[:1]:
                    kill(worker)
                    kills += 1
                waited(process, 8)
            died = process.poll()
            process.send_signal(2)
            code = died if died is not None else process.wait(120)
        this = Round([1], on_s3=False, codes=[code])
        self.left_over(mark, memory, this)
        growth, by_title = growth_of(samples)
        this.broken += [f"{name} grew by {by:.0f}" for name, by in growth.items() if by > GROWTH[name]]
        if code != 130:
            this.broken.append(f"exit code {code} in place of 130")
        return {
            "minutes": minutes, "kills": kills, "growth": growth, "growth_by_process": by_title,
            "last": total(samples[-1]), "broken": this.broken,
        }  # fmt: skip


Sizes = dict[str, dict[str, float]]
"""By the title of a process: private memory, open files, processes."""


def sizes(mark: str) -> Sizes:
    """Of a command's whole tree but its train workers, which come and go.

    The log monitor's files are not counted: it opens every log there is, and closes all when it has 200 (Ray's limit).
    """
    found: Sizes = defaultdict(lambda: dict.fromkeys(GROWTH, 0.0))
    workers = {one.pid for one in train_workers(mark)}
    for one in marked(mark):
        try:
            if one.pid not in workers:
                title = faults.title(one)[:60]
                of_title = found[title]
                of_title["memory_mb"] += one.memory_full_info().uss / 1e6
                of_title["files"] += 0 if title == "log_monitor" else one.num_fds()
                of_title["processes"] += 1
        except psutil.Error:
            continue
    return dict(found)


def total(sample: Sizes) -> dict[str, float]:
    """Of all processes."""
    return {name: sum(of_title[name] for of_title in sample.values()) for name in GROWTH}


def growth_of(samples: list[Sizes]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """From the first third of a life to its last, in all and by process where it is not nothing."""
    third = max(1, len(samples) // 3)

    def between(of: Callable[[Sizes], dict[str, float]]) -> dict[str, float]:
        first, last = ([of(one) for one in part] for part in (samples[:third], samples[-third:]))
        return {name: round(median(s[name] for s in last) - median(s[name] for s in first), 1) for name in GROWTH}

    nothing = dict.fromkeys(GROWTH, 0.0)
    titles = sorted({title for one in samples for title in one})
    by_title = {title: between(lambda one, title=title: one.get(title, nothing)) for title in titles}
    return between(total), {title: by for title, by in by_title.items() if any(abs(by[n]) >= 1 for n in by)}


def command(file: Path, mark: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """`simclr-ray pretrain` under way, marked, in a local Ray of its own."""
    variables = {MARK: mark, "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
    return program("-m", "simclr_ray.cli", "pretrain", file, variables=variables)


def waited(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether it ended within that time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def kill(process: psutil.Process) -> None:
    """Kill what may be gone already."""
    try:
        process.kill()
    except psutil.Error:
        return


def losses(uri: str, scratch: Path) -> dict[int, float]:
    """By step, of a run folder anywhere; a step recorded twice would show as one too many."""
    file = scratch / f"metrics-{uuid.uuid4()}.jsonl"
    file.write_bytes(storage.read_bytes(storage.join(uri, "metrics.jsonl")))
    records = read_jsonl(file)
    assert len({record.step for record in records}) == len(records), "a step is recorded twice"
    return {record.step: record.values["train/loss"] for record in records}


def tell(number: int, one: Round, steps: int) -> None:
    """A line of a run, and one for each promise that it broke."""
    print(
        f"run {number}: {one.seconds:.0f} s, workers {one.workers}, codes {one.codes}, {one.attempts} attempts, "
        f"{one.equal} of {steps} losses equal, largest difference {one.largest_difference:.1e}; "
        f"{'; '.join(one.happened)}",
        *one.broken, sep="\n  BROKEN ", flush=True,
    )  # fmt: skip


def report(rounds: list[Round], life: dict[str, Any], options: argparse.Namespace) -> int:
    """Print, write, and say whether all is well."""
    counted = Counter(re.sub(r"[\d.]+ |for .*| of step.*", "", text) for one in rounds for text in one.happened)
    broken = [text for one in rounds for text in one.broken] + life["broken"]
    same = [one for one in rounds if len(set(one.workers)) == 1]
    result = {
        "machine": machine(), "seed": options.seed, "minutes": options.minutes, "steps_of_a_run": options.steps,
        "runs": len(rounds), "commands": sum(len(one.codes) for one in rounds),
        "attempts": sum(one.attempts for one in rounds), "faults": dict(counted.most_common()),
        "exit_codes": dict(Counter(str(code) for one in rounds for code in one.codes)),
        "steps": sum(options.steps for _ in rounds),
        "equal_in_every_digit": f"{sum(one.equal for one in same)} of {options.steps * len(same)}",
        "with_other_numbers_of_workers": {
            "runs": len(rounds) - len(same),
            "largest_difference": max((one.largest_difference for one in rounds if one not in same), default=0),
        },
        "long_life": life, "broken": broken, "rounds": [asdict(one) for one in rounds],
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))
    return 1 if broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--life", type=float, default=0.25, help="share of the minutes for the long life of one driver")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tolerance", type=float, default=0.02, help="relative, where the number of workers changed")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes * (1 - options.life)
    with tempfile.TemporaryDirectory() as scratch:
        server = Seaweed(Path(scratch, "s3"))
        os.environ.update(server.environment())
        server.start()
        try:
            with Proxy(server.endpoint) as proxy:
                soak, rounds = Soak(options, Path(scratch), server, proxy), list[Round]()
                while time.monotonic() < end:
                    rounds.append(soak.round(len(rounds)))
                    tell(len(rounds), rounds[-1], options.steps)
                return report(rounds, soak.long_life(options.minutes * options.life), options)
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
