"""Is the loss exact: the part `exact` of benchmarks/loss.py.

Value and parameter gradients after DistributedDataParallel's mean, over gloo ranks, against the reference on one
process in float64; and what float32 leaves of the gradient late in training, when every positive has won.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from loss_peers import ONE_PROCESS, RANKS, Implementation, NotRun
from loss_processes import join_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_ray.learn import reference
from simclr_ray.learn.nt_xent import distributed_nt_xent

SHARES = {
    1: {"even": [24]},
    2: {"even": [12, 12], "uneven": [17, 7]},
    3: {"even": [8, 8, 8], "uneven": [13, 0, 11]},
    4: {"even": [6, 6, 6, 6], "uneven": [11, 1, 5, 7]},
}
"""Images of every rank, by number of ranks; 24 in all."""
EXCHANGES = ("gather", "half", "ring")
TILES = (None, 5, 7)
"""Rows and columns of a tile; 5 and 7 divide hardly any share."""
TEMPERATURES = (0.5, 0.1, 0.01)
"""The last is below 1/70, where sums need a running maximum."""
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of projections; parameters are float32 where projections are bfloat16."""
FLOAT64_BOUND = 1e-12

EASY_DIM, EASY_NOISE = 128, 0.175
"""So that a positive has a cosine similarity of 0.97, a negative one of about 0."""


def exact(quick: bool) -> dict[str, Any]:
    numbers = [1, 2] if quick else list(SHARES)
    ranks = {n: _on_ranks(n) for n in numbers}
    result = {
        "images": 24,
        "shares": {str(n): SHARES[n] for n in numbers},
        "tiles": list(TILES),
        "temperatures": list(TEMPERATURES),
        "largest_error": {str(n): outcome["ours"] for n, outcome in ranks.items()},
        "one_process_reference": _reference_by_dtype(),
        "peers_float64": {str(n): outcome["peers"] for n, outcome in ranks.items() if n > 1},
        "easy_images": 64 if quick else 256,
        "easy_pairs": _easy_pairs(64 if quick else 256),
    }
    result["worst_gradient"] = {
        dtype: max(e["gradient"] for ways in result["largest_error"].values() for e in ways[dtype].values())
        for dtype in DTYPES
    }
    result["float64_bound"] = FLOAT64_BOUND
    return result


def show_exact(result: dict[str, Any]) -> None:
    print("\nlargest relative error of parameter gradients after the mean over ranks (in brackets: of the loss value),")
    print("against the reference on one process in float64")
    ranks = result["largest_error"]
    print(f"  {'projections':<13}{'exchange':<10}" + "".join(f"{'W = ' + n:>18}" for n in ranks))
    for dtype in DTYPES:
        for way in EXCHANGES:
            cells = [f"{ranks[n][dtype][way]['gradient']:.1e} ({ranks[n][dtype][way]['loss']:.0e})" for n in ranks]
            print(f"  {dtype:<13}{way:<10}" + "".join(f"{cell:>18}" for cell in cells))
    for dtype, worst in result["worst_gradient"].items():
        own = result["one_process_reference"][dtype]["gradient"]
        line = f"  {dtype}: worst {worst:.1e}; the reference itself in this type, on one process: {own:.1e}"
        if dtype == "float64":
            line += f"; bound {result['float64_bound']:.0e} {'kept' if worst <= result['float64_bound'] else 'BROKEN'}"
        print(line)
    print("\npeers, float64, even rows: the same error of the gradient")
    for n, peers in result["peers_float64"].items():
        for name, error in peers.items():
            print(f"  W = {n}  {name:<17}" + (error if isinstance(error, str) else f"{error:.1e}"))
    easy = result["easy_pairs"]
    print(
        f"\nlate in training ({result['easy_images']} easy pairs, float32): relative error of the projections' gradient"
    )
    widths = {name: max(len(name) + 2, 10) for name in easy[0]["error"]}
    print(f"  {'temperature':<11}{'loss':>10}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in easy:
        cells = {name: "not run" if isinstance(e, str) else f"{e:.1e}" for name, e in row["error"].items()}
        shown = "".join(f"{cells[name]:>{width}}" for name, width in widths.items())
        print(f"  {row['temperature']:<11}{row['loss']:>10.1e}{shown}")


def _on_ranks(ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_as_rank, (ranks, folder), nprocs=ranks)
        return torch.load(Path(folder) / "result.pt")


def _as_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, ranks, folder)
    ours: dict[str, dict[str, dict[str, float]]] = {
        dtype: {way: {"gradient": 0.0, "loss": 0.0} for way in EXCHANGES} for dtype in DTYPES
    }
    cases = itertools.product(DTYPES, EXCHANGES, SHARES[ranks].values(), TILES, TEMPERATURES)
    for dtype, way, shares, tile, temperature in cases:

        def loss_of(z: Tensor, way: str = way, tile: int | None = tile, temperature: float = temperature) -> Tensor:
            return distributed_nt_xent(z, temperature, exchange=way, tile=tile).loss

        errors = _errors(_step_of_ranks(loss_of, dtype, shares), _one_process("float64", temperature))
        ours[dtype][way] = {what: max(error, ours[dtype][way][what]) for what, error in errors.items()}
    peers: dict[str, float | str] = {}
    if ranks > 1:
        for name, implementation in RANKS.items():
            if implementation.kind == "peer":
                try:
                    step = _step_of_ranks(implementation.make(0.1), "float64", SHARES[ranks]["even"])
                except NotRun as reason:
                    peers[name] = str(reason)
                else:
                    peers[name] = _errors(step, _one_process("float64", 0.1))["gradient"]
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, ours)
    worst = {
        dtype: {
            way: {what: max(one[dtype][way][what] for one in everyone) for what in ("gradient", "loss")}
            for way in EXCHANGES
        }
        for dtype in DTYPES
    }
    if rank == 0:
        torch.save({"ours": worst, "peers": peers}, Path(folder) / "result.pt")
    dist.barrier()
    # Without the interpreter's teardown: gloo's threads and a reducer that is still referenced abort it now and then.
    os._exit(0)


def _model(dtype: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    return model.double() if dtype == "float64" else model


def _views(dtype: str) -> Tensor:
    """Of the global batch, (2, 24, 32): made in float32, so that all types start from the same numbers."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 32, generator=generator)
    views = images + 0.5 * torch.randn(2, 24, 32, generator=generator)
    return views.double() if dtype == "float64" else views


def _step_of_ranks(loss_of: Any, dtype: str, shares: list[int]) -> tuple[float, Tensor]:
    """The global loss as this rank knows it, and all parameters' gradients after the mean."""
    parallel = DistributedDataParallel(_model(dtype))
    mine = _views(dtype).split(shares, dim=1)[dist.get_rank()].flatten(0, 1)
    loss = loss_of(parallel(mine).to(DTYPES[dtype]))
    loss.backward()
    return float(loss.detach()), _gradient(parallel)


def _one_process(dtype: str, temperature: float) -> tuple[float, Tensor]:
    model = _model(dtype)
    loss = reference.nt_xent(model(_views(dtype).flatten(0, 1)).to(DTYPES[dtype]), temperature)
    loss.backward()
    return float(loss.detach()), _gradient(model)


def _reference_by_dtype() -> dict[str, dict[str, float]]:
    """What the type alone costs: the reference with itself in float64."""
    every = {d: [_errors(_one_process(d, t), _one_process("float64", t)) for t in TEMPERATURES] for d in DTYPES}
    return {d: {what: max(e[what] for e in errors) for what in ("gradient", "loss")} for d, errors in every.items()}


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _errors(actual: tuple[float, Tensor], expected: tuple[float, Tensor]) -> dict[str, float]:
    return {"gradient": _relative_error(actual[1], expected[1]), "loss": _no_nan(abs(actual[0] / expected[0] - 1))}


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return _no_nan(float((actual.double() - expected).norm() / expected.norm()))


def _no_nan(error: float) -> float:
    """NaN would be lost in a maximum."""
    return math.inf if math.isnan(error) else error


def _easy_pairs(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, EASY_DIM, generator=generator)
    z = (images + EASY_NOISE * torch.randn(2, count, EASY_DIM, generator=generator)).flatten(0, 1)
    in_float64 = Implementation(lambda t: lambda z: reference.nt_xent(z.double(), t), "peer")
    compared = ONE_PROCESS | {"naive in float64": in_float64}
    rows = []
    for temperature in (0.5, 0.1, 0.05, 0.02):
        loss, truth = _of_projections(lambda z, t=temperature: _without_cancellation(z, t), z.double())
        errors: dict[str, float | str] = {}
        for name, implementation in compared.items():
            try:
                loss_of = implementation.make(temperature)
            except NotRun as reason:
                errors[name] = str(reason)
            else:
                errors[name] = _relative_error(_of_projections(loss_of, z)[1], truth)
        rows.append({"temperature": temperature, "loss": loss, "error": errors})
    return rows


def _without_cancellation(z: Tensor, temperature: float) -> Tensor:
    """The whole matrix once more, with the positive kept out of the sum.

    The reference cannot be the truth here, not even in float64: a loss of 1e-15 as the difference of two logits of 50
    has hardly a digit left.
    """
    unit = F.normalize(z, dim=1)
    similarity = unit @ unit.T / temperature
    anchors = torch.arange(len(z))
    positives = anchors.roll(len(z) // 2)
    negatives = similarity.index_put(
        (anchors.repeat(2), torch.cat([anchors, positives])), torch.tensor(-torch.inf).to(z)
    )
    x = negatives.logsumexp(dim=1) - similarity[anchors, positives]
    return torch.logaddexp(x, torch.zeros_like(x)).mean()


def _of_projections(loss_of: Any, z: Tensor) -> tuple[float, Tensor]:
    z = z.clone().requires_grad_()
    loss = loss_of(z)
    loss.backward()
    return float(loss.detach()), z.grad
