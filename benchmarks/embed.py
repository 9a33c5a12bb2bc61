"""Throughput of `embed` beside a bare loop over the same images: read, decode, encode, nothing else.

The bare loop is what anybody would write: PyArrow reads a shard's row groups, each image is decoded and resized, 256 go
through the encoder at a time, on as many compute threads as the actor of `embed` has; vectors are dropped. `embed`
adds ranges, checks, Ray, Parquet files and a manifest. Rounds alternate and medians are told, by the clock and by the
seconds of CPU that the process took, which other work on the machine disturbs less. "With its start" is the verb as a
user calls it on a cluster that runs: an actor's process starts, imports torch and gets the encoder first.

    python -m benchmarks.embed [--rounds 3] [--encoder small|resnet18] [--size 28]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import ray
import torch

from benchmarks.machine import machine
from simclr_ray.config import ClusterConfig
from simclr_ray.configure import load_config
from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.evaluate.encode import TrainedEncoder, load_encoder
from simclr_ray.publish.embed import EmbedActor, _order, embed
from simclr_ray.publish.embed_folder import EmbedOptions, claim_folder, identity_of
from simclr_ray.publish.embed_part import ROWS_AT_ONCE, PartMaker
from simclr_ray.publish.parts import cut
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.build import build_model
from simclr_ray.train.cluster import connected
from simclr_ray.train.derive import derive
from simclr_ray.train.run import open_run
from simclr_ray.views.apply import central_view, normalise

ROOT = Path(__file__).parents[1]
DATA = ROOT / "jobs" / "data" / "fashion-mnist" / "train"
RESULTS = ROOT / "benchmarks" / "results" / "embed.json"


class Rate(NamedTuple):
    """Images a second."""

    clock: float
    cpu: float
    """Of the process's own seconds."""


def rate(images: int, work: Callable[[], object], cpu: Callable[[], float] = time.process_time) -> Rate:
    begun, spent = time.perf_counter(), cpu()
    work()
    return Rate(images / (time.perf_counter() - begun), images / (cpu() - spent))


def make_run(folder: Path, encoder: str, size: int) -> str:
    """An encoder with initial weights: its arithmetic takes as long as a trained one's."""
    config = load_config({
        "run": {"folder": str(folder)}, "data": {"train": str(DATA)}, "views": {"preset": "cifar", "size": size},
        "model": {"encoder": encoder, "projection_dim": 64}, "optim": {"warmup_epochs": 0},
        "train": {"global_batch": 256, "steps": 1},
    })  # fmt: skip
    manifest = read_manifest(str(DATA))
    run, _ = open_run(config, derive(config, manifest), manifest.fingerprint)
    ckpt.save(run.checkpoints, ckpt.Checkpoint(1, ckpt.model_tensors(build_model(config)), {}, {}))
    return run.uri


@torch.inference_mode()
def bare_loop(trained: TrainedEncoder, manifest: Manifest) -> None:
    encoder = trained.model.encoder.to(memory_format=torch.channels_last)
    waiting: list = []

    def encode() -> None:
        views = central_view(waiting, trained.policy)
        encoder(normalise(torch.from_numpy(views), trained.policy)).numpy()
        waiting.clear()

    for shard in range(len(manifest.table)):
        file = pq.ParquetFile(manifest.shard_uri(shard))
        for group in range(file.num_row_groups):
            for data in file.read_row_group(group, columns=["image"])["image"].to_pylist():
                image = decode(data, Limits())
                assert not isinstance(image, Rejected)
                waiting.append(image)
                if len(waiting) == ROWS_AT_ONCE:
                    encode()
    if waiting:
        encode()


def maker_alone(trained: TrainedEncoder, manifest: Manifest, out: Path) -> Rate:
    """What an actor does, in this process: everything but Ray."""
    options = EmbedOptions()
    identity = identity_of(trained, manifest, Limits(), options, 4096)
    order = _order(str(out), trained, manifest, Limits(), options, identity)
    claim_folder(str(out), identity)
    maker = PartMaker(order, trained.model.encoder.to(memory_format=torch.channels_last), torch.device("cpu"))
    return rate(manifest.rows, lambda: [maker.make(part) for part in cut(manifest.rows, 4096)])


def actors(trained: TrainedEncoder, manifest: Manifest, run: str, out: Path) -> tuple[Rate, Rate]:
    """The bare loop, and then an actor's work asked part by part as Ray Data asks it, in one process of Ray's.

    In Ray's, for Ray gives its workers a lower priority than a program has, which tells on a busy machine.
    """
    options = EmbedOptions()
    identity = identity_of(trained, manifest, Limits(), options, 4096)
    order = _order(str(out), trained, manifest, Limits(), options, identity)
    claim_folder(str(out), identity)
    wrapped = [ray.put(order), ray.put(trained.model.encoder)]
    actor = ray.remote(num_cpus=1)(_Held).remote(wrapped, 1)
    parts = cut(manifest.rows, 4096)
    ray.get(actor.ready.remote())

    def work() -> None:
        answers = [actor.make.remote({"first": [part.first], "stop": [part.stop]}) for part in parts]
        assert all(not one["error"][0] for one in ray.get(answers))

    def cpu() -> float:
        return ray.get(actor.cpu.remote())

    bare = rate(manifest.rows, lambda: ray.get(actor.bare.remote(run)), cpu)
    measured = rate(manifest.rows, work, cpu)
    ray.kill(actor)
    return bare, measured


class _Held:
    def __init__(self, wrapped: list, cpus: int) -> None:
        self._actor = EmbedActor(*wrapped, cpus)

    def ready(self) -> bool:
        return True

    def cpu(self) -> float:
        return time.process_time()

    def bare(self, run: str) -> None:
        bare_loop(load_encoder(run), read_manifest(str(DATA)))

    def make(self, batch: dict) -> dict:
        return self._actor(batch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoder", default="small")
    parser.add_argument("--size", type=int, default=28)
    options = parser.parse_args()
    torch.set_num_threads(1)
    manifest = read_manifest(str(DATA))
    ways: dict[str, list[Rate]] = {}
    with tempfile.TemporaryDirectory() as scratch, connected(ClusterConfig()):
        base = Path(scratch)
        run = make_run(base / "run", options.encoder, options.size)
        trained = load_encoder(run)
        for number in range(options.rounds):
            bare_rate, actor_rate = actors(trained, manifest, run, base / f"actor-{number}")
            measured = {
                "bare loop": bare_rate,
                "an actor at work": actor_rate,
                "a part's work, without Ray": maker_alone(trained, manifest, base / f"maker-{number}"),
            }
            report = embed(run, str(DATA), str(base / f"out-{number}"), EmbedOptions(actors=(1, 1)))
            measured["embed, one actor, with its start"] = Rate(report.rows / report.seconds, float("nan"))
            for name, value in measured.items():
                ways.setdefault(name, []).append(value)
            print({name: (round(one.clock), one.cpu) for name, one in measured.items()}, flush=True)
    bare = ways["bare loop"]
    result = {
        "machine": machine(), "encoder": options.encoder, "size": options.size, "images": manifest.rows,
        "rounds": options.rounds, "load": os.getloadavg(),
        "images_a_second": {
            name: {"clock": round(statistics.median(one.clock for one in rates), 1),
                   "cpu": round(statistics.median(one.cpu for one in rates), 1)}
            for name, rates in ways.items()
        },
        "of_the_bare_loop": {
            name: {"clock": round(statistics.median(a.clock / b.clock for a, b in zip(rates, bare, strict=True)), 3),
                   "cpu": round(statistics.median(a.cpu / b.cpu for a, b in zip(rates, bare, strict=True)), 3)}
            for name, rates in ways.items()
        },
    }  # fmt: skip
    for table in ("images_a_second", "of_the_bare_loop"):
        result[table]["embed, one actor, with its start"].pop("cpu")  # type: ignore[index]
    print(json.dumps(result, indent=1))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {f"{options.encoder} {options.size}": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
