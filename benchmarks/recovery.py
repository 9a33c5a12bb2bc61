"""How long a run stands still: after a killed worker, after a lost node, and at a checkpoint.

    python -m benchmarks.recovery [--rounds 3]

worker      seconds from SIGKILL of the train worker to the next step, and until the lost steps are done again
node        seconds from the end of a node that a rank runs on to the next step, with fewer workers
            Both beside Ray Train's own: a worker group of the same size that does nothing, from the same event to its
            next sign of life. The difference is ours: libraries, model, checkpoint, stream, first step.
checkpoint  of a SimCLR ResNet-50 with LARS: how long the steps stand still for a copy of the state, and how long the
            copy takes to be written beside them, onto the local disk

Prints a table and writes benchmarks/results/recovery.json. Health checks of the clusters are those of Ray's tests
(a node is given up after 3 silent seconds, a worker group after 20 without all its workers): with Ray's defaults a node
is given up after some 30 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.machine import machine
from simclr_ray.config import Config
from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest
from simclr_ray.learn.optim import make_optimizer
from simclr_ray.observe.metrics import read_jsonl
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.build import build_model
from simclr_ray.train.saver import Intervals, Saver
from tests.conftest import make_data_set, real_rows
from tests.faults.commands import recipe, started, steps_done, train_workers, wait_for

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/recovery.json"
STEPS = 3000
"""More than a round sees."""
CHECKPOINT_EVERY = 50
CALM = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3", "RAY_AUTH_MODE": "disabled",
}  # fmt: skip


def killed_worker(scratch: Path, data: Manifest) -> dict[str, float]:
    """Ours: from the kill to the next step, and to the step that was the last one."""
    folder = scratch / "run"
    file = recipe(
        folder, data, train__steps=STEPS, optim__warmup_epochs=1, train__checkpoint_every=CHECKPOINT_EVERY,
    )  # fmt: skip
    with started(file) as process:
        wait_for(lambda: steps_done(folder) >= CHECKPOINT_EVERY + 20)
        (worker,) = train_workers(process)
        at, reached = time.time(), steps_done(folder)
        worker.kill()
        wait_for(lambda: _next_record(folder, at) is not None)
        next_s = (_next_record(folder, at) or 0.0) - at
        wait_for(lambda: steps_done(folder) >= reached)
        caught_up_s = time.time() - at
        process.terminate()
        process.wait(60)
    return {"next_step_s": next_s, "caught_up_s": caught_up_s, "lost_steps": reached % CHECKPOINT_EVERY}


def _next_record(folder: Path, after: float) -> float | None:
    """Wall time of the first record that is younger; a new attempt has cut the older ones."""
    times = [record.wall_s for record in read_jsonl(folder / "metrics.jsonl") if record.wall_s > after]
    return min(times, default=None)


def killed_bare_worker(scratch: Path) -> float:
    """Ray Train alone: from the kill to the next sign of life."""
    with _bare(scratch, "worker") as process:
        (worker,) = train_workers(process)
        at = time.time()
        worker.kill()
        return _next_sign(scratch, at) - at


def lost_node(scratch: Path, data: Manifest) -> float:
    """Ours, by the program of the fault tests."""
    file = recipe(
        scratch / "run", data, train__steps=600, optim__warmup_epochs=1, train__checkpoint_every=CHECKPOINT_EVERY,
        cluster__workers=2, cluster__min_workers=1,
    )  # fmt: skip
    program = [sys.executable, "-m", "tests.faults.two_nodes", str(file), "kill", str(CHECKPOINT_EVERY + 20)]
    done = subprocess.run(program, cwd=ROOT, env=os.environ | CALM, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray may have printed more after it
    return float(json.loads(told[-1])["next_step_s"])


def lost_bare_node(scratch: Path) -> float:
    """Ray Train alone, from the end of the node on."""
    with _bare(scratch, "node"):
        (scratch / "kill").touch()
        wait_for(lambda: (scratch / "killed").exists() and bool((scratch / "killed").read_text()))
        at = float((scratch / "killed").read_text())
        time.sleep(1.0)  # rank 0 may be on the other node, and writes until it is stopped
        lines, quiet = 0, time.monotonic()
        while time.monotonic() - quiet < 2.0:
            if lines != (lines := len((scratch / "alive").read_text().splitlines())):
                quiet = time.monotonic()
            time.sleep(0.1)
        last = float((scratch / "alive").read_text().splitlines()[-1])
        return _next_sign(scratch, last) - at


class _bare:
    """recovery_bare.py under way, with its group alive."""

    def __init__(self, scratch: Path, event: str) -> None:
        self._scratch, self._event = scratch, event

    def __enter__(self) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "benchmarks.recovery_bare", str(self._scratch), self._event]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | CALM
        self._process = subprocess.Popen(
            program, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        alive = self._scratch / "alive"
        wait_for(lambda: alive.exists() and len(alive.read_text().splitlines()) > 20)
        return self._process

    def __exit__(self, *_: object) -> None:
        (self._scratch / "stop").touch()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            for one in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
                one.kill()


def _next_sign(scratch: Path, after: float) -> float:
    def found() -> list[float]:
        return [at for at in map(float, (scratch / "alive").read_text().split()) if at > after + 0.5]

    wait_for(lambda: bool(found()))
    return found()[0]


def checkpoint(scratch: Path) -> dict[str, float]:
    """A state of usual size, saved as a run does."""
    config: Config = load_config({"model": {"encoder": "resnet50"}})
    model = build_model(config)
    optimizer = make_optimizer("lars", model, weight_decay=1e-6, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 1e-6
    optimizer.step()
    saver = Saver(str(scratch), Intervals(1, None, 100), keep=2, max_failures=1, say=print)
    stalls, writes = [], []
    for step in range(1, 7):
        state = ckpt.Checkpoint(step, ckpt.model_tensors(model), ckpt.optimizer_tensors(optimizer), {"manifest": "-"})
        stalls.append(saver.save(state, first=lambda: None))
        saver.wait()
        writes.append(saver.take_seconds() or 0.0)
    size = sum(file.stat().st_size for file in scratch.glob("step-000000006/*"))
    return {"stall_s": median(stalls), "write_s": median(writes), "MB": size / 1e6}


def repeated(rounds: int, measure: Callable[[Path], Any]) -> list[Any]:
    results = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            results.append(measure(Path(scratch)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        data = make_data_set(Path(folder) / "data", real_rows(400))
        with tempfile.TemporaryDirectory() as scratch:
            saved = checkpoint(Path(scratch))
        print(f"checkpoint of {saved['MB']:.0f} MB: steps stand still for {saved['stall_s']:.3f} s, "
              f"written in {saved['write_s']:.2f} s beside them", flush=True)  # fmt: skip
        ours = repeated(rounds, lambda scratch: killed_worker(scratch, data))
        bare = repeated(rounds, killed_bare_worker)
        next_s, caught_up_s = (median(one[name] for one in ours) for name in ("next_step_s", "caught_up_s"))
        print(f"worker killed: next step after {next_s:.1f} s, caught up after {caught_up_s:.1f} s; "
              f"Ray Train alone {median(bare):.1f} s", flush=True)  # fmt: skip
        ours_node = repeated(rounds, lambda scratch: lost_node(scratch, data))
        bare_node = repeated(rounds, lost_bare_node)
        print(f"node lost: next step after {median(ours_node):.1f} s; Ray Train alone {median(bare_node):.1f} s")
    result = {
        "machine": machine(), "health_checks": CALM, "checkpoint_resnet50": saved,
        "worker": {"ours": ours, "ray_train_alone_s": bare},
        "node": {"ours_s": ours_node, "ray_train_alone_s": bare_node},
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
