"""What a step takes on many workers, stage by stage, from rates of one: the part `model` of benchmarks/scale.py.

Pure arithmetic, and what fits and checks it: gloo ranks on this machine, with the real loss, the demo's encoder and
DistributedDataParallel. Two things are taken for true: ranks that share cores share their speed, and collectives go
round a ring, so that each of W ranks sends (W - 1) / W of the bytes in W - 1 turns.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_processes import join_ranks
from torch.nn.parallel import DistributedDataParallel

from simclr_ray.learn.nt_xent import distributed_nt_xent
from simclr_ray.model.encoder import make_encoder
from simclr_ray.model.projector import make_projector
from simclr_ray.model.simclr import SimCLR

FLOAT = 4
RANKS = (1, 2, 4, 8)
GATHERED = (1 << 14, 1 << 17, 1 << 20, 1 << 23)
"""Bytes of all ranks together, in the collectives that are timed."""
SIDE, DIM, IMAGES = 32, 128, 512
REPEATS = 5


@dataclass(frozen=True)
class Work:
    """A step."""

    images: int
    """B, over all workers."""
    dim: int
    """D of a projection."""
    parameters: int
    """Whose gradients are averaged."""
    side: int
    """Pixels of a view."""
    image_bytes: float
    """As stored."""
    requests_an_image: float


@dataclass(frozen=True)
class Rates:
    """Of one of each."""

    encoder_s: float
    """Of a device, for forward and backward of an image's two views."""
    pair_s: float
    """Of a device, for value and gradient of a pair of rows, a number of the projection."""
    turn_s: float
    """Of a collective, each time around."""
    link_bytes_s: float
    """Into a worker."""
    views_s: float = 0.0
    """Of a core, for the two views of an image."""
    get_s: float = 0.0
    """Of a reader, for a request's first byte."""
    read_bytes_s: float = float("inf")
    """Of a reader."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of each stage of a step."""

    read: float
    views: float
    ship: float
    encoder: float
    loss: float
    gather: float
    gradients: float

    @property
    def data(self) -> float:
        """The slowest of what goes on beside the workers."""
        return max(self.read, self.views, self.ship)

    @property
    def train(self) -> float:
        """What follows on itself in a worker."""
        return self.encoder + self.loss + self.gather + self.gradients

    @property
    def step(self) -> float:
        """The slower of both planes."""
        return max(self.data, self.train)

    @property
    def slowest(self) -> str:
        """Name of the stage that decides."""
        stages = asdict(self)
        names = ("read", "views", "ship") if self.data > self.train else ("encoder", "loss", "gather", "gradients")
        return max(names, key=lambda name: stages[name])


def step_times(work: Work, rates: Rates, *, workers: int, data_cores: float, cores_shared: float = 1.0) -> StepTimes:
    """Of a step.

    Args:
        work: What it does.
        rates: Of one of each.
        workers: W.
        data_cores: For reading and views.
        cores_shared: Ranks to a core, where this machine plays several.
    """
    share = work.images / workers
    pairs = 2 * share * 2 * work.images * work.dim
    readers = max(data_cores, 1e-9)
    return StepTimes(
        read=work.images * (work.requests_an_image * rates.get_s + work.image_bytes / rates.read_bytes_s) / readers,
        views=work.images * rates.views_s / readers,
        ship=share * 2 * 3 * work.side**2 / rates.link_bytes_s,
        encoder=share * rates.encoder_s * cores_shared,
        loss=pairs * rates.pair_s * cores_shared,
        gather=ring(2 * work.images * work.dim * FLOAT, rates, workers, cores_shared),
        gradients=2 * ring(work.parameters * FLOAT, rates, workers, cores_shared),
    )


def ring(size: float, rates: Rates, workers: int, cores_shared: float = 1.0) -> float:
    """Seconds until each worker has `size` bytes of which it had its share."""
    others = workers - 1
    return cores_shared * (others * rates.turn_s + others / workers * size / rates.link_bytes_s)


def loss_bytes(work: Work, tile: int = 512) -> float:
    """Memory of the loss in a worker: all projections once, and a tile."""
    return 2 * work.images * work.dim * FLOAT + 3 * tile * tile * FLOAT


def matrix_bytes(work: Work, workers: int) -> float:
    """What a worker's rows of the matrix of similarities would take, which nobody stores here."""
    return 2 * work.images / workers * 2 * work.images * FLOAT


# What is measured on this machine.


@dataclass(frozen=True)
class Measured:
    """Of one number of ranks; medians, of the slowest rank."""

    ranks: int
    step_s: float
    encoder_s: float
    """Forward and backward of the encoder alone, an image."""
    loss_s: float
    """Of the loss alone, collectives included."""
    gather_s: dict[int, float]
    """By bytes of all ranks together."""
    reduce_s: dict[int, float]


def measure(ranks: int) -> Measured:
    """In processes of their own, a thread each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(ranks, folder), nprocs=ranks, join=True)  # type: ignore[no-untyped-call]
        found: Measured = torch.load(f"{folder}/found", weights_only=False)
    return found


def model() -> SimCLR:
    """The demo's."""
    encoder = make_encoder("small", width=1, stem="cifar")
    return SimCLR(encoder, make_projector(encoder.embedding_dim, layers=2, output_dim=DIM))


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, ranks, folder)
    torch.manual_seed(0)
    share = IMAGES // ranks
    views = torch.randn(2 * share, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    network = model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    alone, together = network, DistributedDataParallel(network) if ranks > 1 else network
    images = [share] * ranks
    rows = torch.randn(2 * share, DIM, requires_grad=True)

    def encode() -> None:
        alone(views).square().mean().backward()

    def loss() -> None:
        distributed_nt_xent(rows, 0.2, images=images, exchange="gather").loss.backward()

    def step() -> None:
        distributed_nt_xent(together(views), 0.2, images=images, exchange="gather").loss.backward()

    found = Measured(
        ranks, _timed(step), _timed(encode) / share, _timed(loss),
        {size: _timed(_gathering(size, ranks)) for size in GATHERED},
        {size: _timed(_reducing(size)) for size in GATHERED},
    )  # fmt: skip
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


def _gathering(size: int, ranks: int) -> Callable[[], None]:
    mine, everyone = torch.zeros(size // FLOAT // ranks), torch.zeros(size // FLOAT // ranks * ranks)
    return lambda: dist.all_gather_into_tensor(everyone, mine)


def _reducing(size: int) -> Callable[[], None]:
    x = torch.zeros(size // FLOAT)
    return lambda: dist.all_reduce(x)


def _timed(work: Callable[[], None]) -> float:
    """Median seconds, of the slowest rank each time."""
    work()
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        started = time.perf_counter()
        work()
        seconds = torch.tensor([time.perf_counter() - started])
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        times.append(float(seconds))
    return median(times)


def fitted(one: Measured, two: Measured) -> Rates:
    """Rates of one rank, and of collectives between two."""
    sizes = np.array(GATHERED, float)
    design = np.stack([np.ones_like(sizes), sizes / 2], axis=1)  # one turn, half the bytes
    weights = 1 / np.array([two.gather_s[size] for size in GATHERED])  # relative errors
    seconds = np.ones_like(sizes)
    (turn, a_byte), *_ = np.linalg.lstsq(design * weights[:, None], seconds, rcond=None)
    pairs = (2 * IMAGES) ** 2 * DIM
    return Rates(one.encoder_s, one.loss_s / pairs, max(turn, 0.0), 1 / a_byte)


def checked(points: Sequence[Measured], rates: Rates, cores: int) -> list[dict[str, float]]:
    """The model beside what was measured, a row for each number of ranks."""
    parameters = sum(p.numel() for p in model().parameters())
    work = Work(IMAGES, DIM, parameters, SIDE, 0.0, 0.0)
    rows = []
    for point in points:
        shared = max(1.0, point.ranks / cores)
        times = step_times(work, rates, workers=point.ranks, data_cores=1, cores_shared=shared)
        rows.append({
            "ranks": point.ranks,
            "encoder_s": point.encoder_s * IMAGES / point.ranks, "encoder_model_s": times.encoder,
            "loss_s": point.loss_s, "loss_model_s": times.loss + times.gather,
            "step_s": point.step_s, "step_model_s": times.train,
        })  # fmt: skip
    return rows


# From here on to clusters that nobody has lent.

RESULTS = Path(__file__).parent / "results"
WORKERS = (8, 32, 128, 512, 2048, 4096)
UNIT, LEAST_BATCH = 64, 4096
R50 = {"parameters": 27_970_624, "side": 224}
"""ResNet-50 with SimCLR's two-layer projector of 2048 and 128."""
ASSUMED = {"encoder_s": 1 / 1250, "pair_s": 6 / 100e12, "turn_s": 20e-6, "link_bytes_s": 12.5e9, "get_s": 0.05}
"""Not measured: a GPU that takes 1,250 images a second (two views, forward and backward, bf16) and 100 TFLOP/s in the
loss (a pair costs 6 a number), NCCL's turn of 20 us, links of 100 Gbit/s, and a store that answers after 50 ms."""
READ_BYTES_S = 60e6
"""Of one connection to a store, assumed too."""


def clusters() -> list[dict[str, Any]]:
    """The model's rows for R50 at 224 pixels; the batch grows with the workers, for each needs a unit of images."""
    ingest, store = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("ingest", "store"))
    cost = ingest["photos"]["cost_us"]
    views_s = (sum(cost["plain loop"].values()) + sum(cost["Ray's share"].values())) / 1e6
    layout = store["layouts"]["canonical shards"]
    rates = Rates(**ASSUMED, views_s=views_s, read_bytes_s=READ_BYTES_S)
    rows = []
    for workers in WORKERS:
        batch = max(LEAST_BATCH, UNIT * workers)
        work = Work(
            batch, DIM, **R50, image_bytes=layout["bytes_an_image"], requests_an_image=layout["requests_an_image"]
        )
        train = step_times(work, rates, workers=workers, data_cores=float("inf"))
        by_one_core = step_times(work, rates, workers=workers, data_cores=1)
        images_s = batch / train.train
        rows.append({
            "workers": workers, "images": batch, "encoder": train.encoder, "loss": train.loss, "gather": train.gather,
            "gradients": train.gradients, "ship": train.ship, "step_s": train.step, "slowest": train.slowest,
            "images_s": images_s, "efficiency": images_s / workers * rates.encoder_s,
            "cores": by_one_core.views / train.train, "readers": by_one_core.read / train.train,
            "requests_s": images_s * work.requests_an_image, "store_gbit_s": images_s * work.image_bytes * 8 / 1e9,
            "loss_mb": loss_bytes(work) / 1e6, "matrix_mb": matrix_bytes(work, workers) / 1e6,
        })  # fmt: skip
    return rows


def modelled(*, quick: bool) -> dict[str, Any]:
    """Measure, compare, and go on to clusters."""
    points = [measure(ranks) for ranks in (RANKS[:2] if quick else RANKS)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rates = fitted(points[0], points[1])
    rows = checked(points, rates, cores)
    print(f"\n  {IMAGES} images of {SIDE} px, the demo's encoder, {cores} cores; seconds measured (by the model)")
    print(f"  {'ranks':>7}{'encoder':>20}{'loss':>20}{'step':>20}")
    for row in rows:
        cells = [f"{row[f'{name}_s']:.3f} ({row[f'{name}_model_s']:.3f})" for name in ("encoder", "loss", "step")]
        print(f"  {row['ranks']:>7}" + "".join(f"{cell:>20}" for cell in cells))
    large = clusters()
    print(f"\n  ResNet-50 at 224 px, {ASSUMED}")
    names = ("encoder", "loss", "gather", "gradients", "step_s", "efficiency")
    print(
        f"  {'workers':>8}{'images':>9}"
        + "".join(f"{name:>12}" for name in names)
        + f"{'images/s':>12}{'cores':>9}{'GET/s':>9}"
    )
    for one in large:
        print(f"  {one['workers']:>8}{one['images']:>9}" + "".join(f"{one[name]:>12.4f}" for name in names)
              + f"{one['images_s']:>12,.0f}{one['cores']:>9,.0f}{one['requests_s']:>9,.0f}")  # fmt: skip
    return {"cores": cores, "rates": asdict(rates), "checked": rows, "assumed": ASSUMED, "clusters": large}
