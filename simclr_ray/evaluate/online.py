"""Numbers while training: kNN, a linear probe and RankMe of the newest checkpoint, in a process of its own.

The process reads checkpoints from the run folder like any reader. It asks Ray for no CPU, so it never takes the
stream's, and runs at the lowest priority of its machine, on one thread: it gets the time that others leave. No step
waits for it; what it costs is written with every result, as seconds of CPU in all and for each step of training
between two results.

It asks with one half of some training images, and searches and learns in the other, never with the test set: nobody
can stop a run where the test set looks best. Results go to `eval/online.jsonl`, a line each.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.errors import DataError, root_cause
from simclr_ray.evaluate.encode import Image, embed, read_some
from simclr_ray.evaluate.knn import knn_top1
from simclr_ray.evaluate.linear import linear_probe
from simclr_ray.observe.console import Console
from simclr_ray.observe.health import rankme
from simclr_ray.observe.metrics import Record, Recorder
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.build import build_model
from simclr_ray.train.derive import limits_of, policy_of
from simclr_ray.train.gauges import ray_gauges
from simclr_ray.train.run import RunFolder
from simclr_ray.views.apply import central_view

LOOK_EVERY_S = 2.0
NAME = "online.jsonl"
PROBE_L2 = (1e-2,)
"""One penalty: a choice would cost more than the training between two results of a small run."""
WAIT_AT_END_S = 120.0


@dataclass(frozen=True)
class OnlineSet:
    """Images to search in, and others to ask with."""

    pool: Image
    queries: Image
    pool_labels: Tensor | None
    """None where the data set has no labels; RankMe alone is left then."""
    query_labels: Tensor | None


def read_online_set(manifest: Manifest, config: Config, limits: Limits) -> OnlineSet:
    """Some images of a data set, by the run's seed, every second one of which asks.

    Raises:
        DataError: too few of them decode.
    """
    images, labels = read_some(manifest, limits, config.evaluate.online_images, seed=config.run.seed)
    mixed = np.random.Generator(np.random.Philox(key=[config.run.seed, 0])).permutation(len(images))
    images = [images[row] for row in mixed]  # neighbours of a source may be alike, and would ask each other
    labels = None if labels is None else labels[mixed]
    views = central_view(images, policy_of(config.views))
    if len(views) < 4:
        raise DataError("too few images to measure while training", where=manifest.folder, got=len(views))
    known = labels is not None and bool((labels >= 0).all())
    numbers = torch.from_numpy(labels) if labels is not None and known else None
    split = (slice(0, None, 2), slice(1, None, 2))
    pool, queries = (views[rows] for rows in split)
    pool_labels, query_labels = (None if numbers is None else numbers[rows] for rows in split)
    return OnlineSet(pool, queries, pool_labels, query_labels)


def measure(model: torch.nn.Module, data: OnlineSet, config: Config) -> dict[str, float]:
    """Accuracy of kNN and a linear probe, one half asking the other, where there are labels, and RankMe."""
    policy = policy_of(config.views)
    queries = embed(model, data.queries, policy)
    numbers = {"rankme": rankme(queries)}
    if data.pool_labels is not None and data.query_labels is not None:
        pool = embed(model, data.pool, policy)
        both = pool, data.pool_labels, queries, data.query_labels
        numbers["knn_top1"] = knn_top1(
            *both, k=min(config.evaluate.knn_k, len(pool)), temperature=config.evaluate.knn_temperature
        )
        classes = 1 + int(max(data.pool_labels.max(), data.query_labels.max()))
        numbers["linear_top1"] = linear_probe(*both, num_classes=classes, seed=config.run.seed, l2_grid=PROBE_L2).top1
    return numbers


class OnlineEvaluator:
    """An actor: looks for checkpoints and measures them, one after another."""

    def __init__(self, run: RunFolder, config: Config) -> None:
        """Give way to everybody else."""
        os.nice(19)
        torch.set_num_threads(1)
        self._run, self._config = run, config
        self._stopping = False
        self._invalid: set[int] = set()
        self._reading = 0.0, 0.0
        """Seconds, of the clock and of CPU, that the images took: part of the first result's cost."""
        self._recorder = Recorder([ray_gauges(run.uri, moments=False)])
        self._results: list[dict[str, Any]] = online_results(run)

    def work(self) -> None:
        """Measure until the run has ended; the last checkpoint is measured too."""
        begun, cpu = time.perf_counter(), time.process_time()
        manifest = read_manifest(str(self._config.evaluate.train or self._config.data.train))
        data = read_online_set(manifest, self._config, limits_of(self._config.data))
        self._reading = time.perf_counter() - begun, time.process_time() - cpu
        while True:
            stopping = self._stopping
            step = self._due()
            if step is not None:
                self._measure(step, data)
            elif stopping:
                return
            else:
                time.sleep(LOOK_EVERY_S)
            self._recorder.again()

    def stop(self) -> None:
        """Have `work` end when nothing is left to measure."""
        self._stopping = True

    def results(self) -> list[dict[str, Any]]:
        """All so far."""
        return self._results

    def _due(self) -> int | None:
        """The newest checkpoint that can be read, if it is far enough from the last that was measured."""
        committed = [step for step in ckpt.committed_steps(self._run.checkpoints) if step not in self._invalid]
        if not committed:
            return None
        last = self._results[-1]["step"] if self._results else 0
        wanted = 1 if self._stopping else int(self._config.evaluate.every or 1)
        return committed[-1] if committed[-1] - last >= wanted else None

    def _measure(self, step: int, data: OnlineSet) -> None:
        begun, cpu = time.perf_counter() - self._reading[0], time.process_time() - self._reading[1]
        try:
            found = ckpt.load(self._run.checkpoints, step)
        except ckpt.InvalidCheckpoint:
            self._invalid.add(step)  # pruned meanwhile, and a newer one is there; or damaged, and an older one is
            return
        model = build_model(self._config)
        model.load_state_dict(found.model)
        numbers = measure(model.encoder.eval(), data, self._config)
        last = self._results[-1]["step"] if self._results else 0
        spent = time.process_time() - cpu
        self._reading = 0.0, 0.0
        self._results.append({
            "step": step,
            **{name: value if np.isfinite(value) else None for name, value in numbers.items()},
            "images": len(data.pool) + len(data.queries),
            "wall_s": time.time(),
            "seconds": round(time.perf_counter() - begun, 3),
            "cpu_s": round(spent, 3),
            "cpu_s_a_step": round(spent / max(1, step - last), 6),
        })  # fmt: skip
        self._recorder.log(online_records(self._results[-1:], self._config.train.global_batch)[0])
        lines = "".join(json.dumps(one) + "\n" for one in self._results)
        storage.write_bytes(self._run.path("eval", NAME), lines.encode())


def online_records(results: Sequence[Mapping[str, Any]], global_batch: int) -> list[Record]:
    """Results as records of the run: whoever draws or exports metrics can take them with the others.

    Args:
        results: Lines of `eval/online.jsonl`.
        global_batch: Images of a step.
    """
    names = {"rankme": "repr/rankme", "knn_top1": "eval/knn_top1", "linear_top1": "eval/linear_top1"}
    return [
        Record(
            int(one["step"]), int(one["step"]) * global_batch, 0, float(one.get("wall_s", 0.0)),
            {names[key]: float(one[key]) for key in names if one.get(key) is not None},
        )
        for one in results
    ]  # fmt: skip


def parse_online(data: bytes) -> list[dict[str, Any]]:
    """Lines of `eval/online.jsonl`; a torn last one is left out."""
    lines = data.decode().splitlines(keepends=True)
    return [dict(json.loads(line)) for line in lines if line.endswith("\n")]


@contextlib.contextmanager
def online_evaluation(config: Config, run: RunFolder) -> Iterator[None]:
    """Within a training, with Ray running: an evaluator beside it, if `evaluate.every` asks for one.

    What it cannot do is said and ends nothing.
    """
    if config.evaluate.every is None:
        yield
        return
    import ray

    actor = ray.remote(num_cpus=0, max_concurrency=3)(OnlineEvaluator).remote(run, config)
    working = actor.work.remote()
    try:
        yield
    except BaseException:
        ray.kill(actor)  # the run has failed or was stopped: nobody waits for its numbers
        raise
    _finish(actor, working, Console())


def _finish(actor: Any, working: Any, console: Console) -> None:
    """Wait for the last checkpoint's numbers, and say them."""
    import ray

    actor.stop.remote()
    try:
        ray.get(working, timeout=WAIT_AT_END_S)
        for one in ray.get(actor.results.remote(), timeout=WAIT_AT_END_S)[-1:]:
            console.say(_sentence(one))
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        console.say(f"not measured while training: {root_cause(error) or (lines or [type(error).__name__])[-1]}")
    ray.kill(actor)


def _sentence(one: dict[str, Any]) -> str:
    parts = [f"{name} {100 * one[key]:.1f} %" for name, key in (("kNN", "knn_top1"), ("linear", "linear_top1"))
             if one.get(key) is not None]  # fmt: skip
    parts += [f"RankMe {one['rankme']:.1f}"] if one.get("rankme") is not None else []
    return (
        f"measured at step {one['step']} on training images, one half asking the other: {', '.join(parts)}; it took "
        f"{one['cpu_s']:.1f} s of CPU at the lowest priority, {1000 * one['cpu_s_a_step']:.1f} ms a step"
    )


def online_results(run: RunFolder) -> list[dict[str, Any]]:
    """What was measured while the run trained, oldest first; nothing where that was not asked for."""
    try:
        return parse_online(storage.read_bytes(run.path("eval", NAME)))
    except FileNotFoundError:
        return []
