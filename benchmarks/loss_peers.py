"""The implementations that benchmarks/loss.py compares, each behind one signature, and the matmuls as floors.

A loss takes the rank's projections z (2n, D), ordered [views a; views b], and returns what a training step calls
backward on. Published packages are used as installed; one that is not there, or that computes another loss, says so
by raising `NotRun`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simclr_ray import collectives
from simclr_ray.learn import reference
from simclr_ray.learn.nt_xent import distributed_nt_xent, nt_xent

Loss = Callable[[Tensor], Tensor]

TILE = 512
"""Of the bare matmuls: what fits the cache of a CPU core, and the loss's own choice there."""


class NotRun(Exception):
    """Why an implementation cannot take part."""


class Implementation(NamedTuple):
    make: Callable[[float], Loss]
    """From the temperature, in the process that runs it; imports what it needs."""
    kind: Literal["ours", "peer"]
    package: str | None = None
    """Of a peer: the distribution that it is installed from; None = written here."""
    power: int = 2
    """Its memory grows as the batch to this power; what is expected not to fit is not run."""
    most_rows: int | None = None
    """Not run above this global 2B."""
    reason: str = ""


def ours(temperature: float, exchange: str = "auto") -> Loss:
    """As the training step calls it."""
    # As a training step calls it, which knows every rank's share.
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return lambda z: distributed_nt_xent(z, temperature, exchange=exchange, images=[len(z) // 2] * ranks).loss


def ours_of_views(temperature: float) -> Loss:
    """As any other program calls it; this joins the views, a copy, and looks for NaN."""
    return lambda z: nt_xent(*_views(z), temperature)


def naive(temperature: float) -> Loss:
    """What one writes by hand: normalise, whole matrix, mask the diagonal, cross entropy."""
    return lambda z: reference.nt_xent(z, temperature)


def naive_gathered(temperature: float) -> Loss:
    """The same with this rank's rows against the gathered columns of all; exact, also in its gradient."""
    from torch.distributed.nn.functional import all_gather

    def loss(z: Tensor) -> Tensor:
        unit = F.normalize(z, dim=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 prefers another name, which 2.6 has not
            columns = torch.cat(all_gather(unit))
        similarity = unit @ columns.T / temperature
        itself = torch.arange(len(z)) + dist.get_rank() * len(z)
        similarity[torch.arange(len(z)), itself] = -torch.inf
        return F.cross_entropy(similarity, itself.roll(len(z) // 2))

    return loss


def lightly(temperature: float) -> Loss:
    os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")  # older releases ask a server whether they are current
    try:
        from lightly.loss.ntx_ent_loss import NTXentLoss
    except ImportError as error:
        raise NotRun(f"not installed ({error})") from error
    loss = NTXentLoss(temperature=temperature, gather_distributed=collectives.world_size() > 1)
    return lambda z: loss(*_views(z))


def solo_learn(temperature: float) -> Loss:
    """The release on PyPI takes two views and knows no other ranks; the repository's takes ids, and gathers."""
    found = importlib.util.find_spec("solo")
    if found is None or not found.submodule_search_locations:
        raise NotRun("not installed (no package named solo)")
    # Its __init__ files import Lightning, wandb and omegaconf. Packages that only have a path let the loss's own file
    # be imported as it is, without them.
    for name in ("solo", "solo.losses", "solo.utils"):
        spec = ModuleSpec(name, loader=None, is_package=True)
        spec.submodule_search_locations = [str(Path(found.submodule_search_locations[0], *name.split(".")[1:]))]
        sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    try:
        function = importlib.import_module("solo.losses.simclr").simclr_loss_func
    except ImportError as error:
        raise NotRun(f"its loss cannot be imported alone ({error})") from error
    if "indexes" in inspect.signature(function).parameters:

        def loss_of_ids(z: Tensor) -> Tensor:
            images = len(z) // 2
            ids = (torch.arange(images) + collectives.rank() * images).repeat(2)
            return function(z, indexes=ids, temperature=temperature)

        return loss_of_ids
    if collectives.world_size() > 1:
        raise NotRun(
            "this release does not gather: on several ranks it has local negatives only, which is another loss"
        )
    return lambda z: function(*_views(z), temperature=temperature)


def pytorch_metric_learning(temperature: float) -> Loss:
    try:
        from pytorch_metric_learning.losses import NTXentLoss
    except ImportError as error:
        raise NotRun(f"not installed ({error})") from error
    loss = NTXentLoss(temperature=temperature)
    return lambda z: loss(z, torch.arange(len(z) // 2).repeat(2))


_CUBIC = "cubic in the batch: it holds several matrices of (2B positive pairs) x (all 2B (2B - 2) negative pairs)"

ONE_PROCESS = {
    "ours": Implementation(ours, "ours"),
    "ours, nt_xent()": Implementation(ours_of_views, "ours"),
    "naive": Implementation(naive, "peer"),
    "lightly": Implementation(lightly, "peer", "lightly"),
    "solo-learn": Implementation(solo_learn, "peer", "solo-learn"),
    "pytorch-metric-learning": Implementation(
        pytorch_metric_learning, "peer", "pytorch-metric-learning", power=3, most_rows=511, reason=_CUBIC
    ),
}
"""By name as printed and stored."""

RANKS = {
    "ours, gather": Implementation(partial(ours, exchange="gather"), "ours"),
    "ours, half": Implementation(partial(ours, exchange="half"), "ours"),
    "ours, ring": Implementation(partial(ours, exchange="ring"), "ours"),
    "naive, gathered": Implementation(naive_gathered, "peer"),
    "lightly": Implementation(lightly, "peer", "lightly"),
    "solo-learn": Implementation(solo_learn, "peer", "solo-learn"),
}
"""The same for several ranks."""

IMPLEMENTATIONS = ONE_PROCESS | RANKS


def symmetric_matmuls(z: Tensor) -> Callable[[], None]:
    """The matmuls that no exact loss in tiles can do without: 4 (2B)^2 D FLOP over all ranks.

    Similarity is symmetric, so each unordered pair of tiles is made once for the sums and, as nothing is stored, once
    more for the gradient, where it serves rows and columns. No exp, no sum, no communication.
    """
    unit, gradient, buffer, spans = _matmul_parts(z)
    pairs = [(i, j) for i in range(len(spans)) for j in range(i, len(spans))]

    def step() -> None:
        for i, j in pairs[collectives.rank() :: collectives.world_size()]:
            a, b = unit[spans[i]], unit[spans[j]]
            tile = buffer[: len(a), : len(b)]
            torch.mm(a, b.T, out=tile)
            torch.mm(a, b.T, out=tile)
            gradient[spans[i]].addmm_(tile, b)
            if i != j:
                gradient[spans[j]].addmm_(tile.T, a)

    return step


def bare_matmuls(z: Tensor) -> Callable[[], None]:
    """The matmuls of the full matrix and of its two gradients, 6 (2B)^2 D FLOP over all ranks, in tiles."""
    unit, gradient, buffer, spans = _matmul_parts(z)
    rows = range(len(spans))[collectives.rank() :: collectives.world_size()]

    def step() -> None:
        for i in rows:
            for j in range(len(spans)):
                a, b = unit[spans[i]], unit[spans[j]]
                tile = buffer[: len(a), : len(b)]
                torch.mm(a, b.T, out=tile)
                gradient[spans[i]].addmm_(tile, b)
                gradient[spans[j]].addmm_(tile.T, a)

    return step


MATMULS = {"symmetric matmuls": symmetric_matmuls, "bare matmuls": bare_matmuls}
"""The floors, by name."""


def installed_peers() -> dict[str, str]:
    """What figures of peers were measured with."""
    found = {}
    for package in sorted({i.package for i in IMPLEMENTATIONS.values() if i.package}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "no distribution installed"
    return found


def _views(z: Tensor) -> tuple[Tensor, ...]:
    return z.unflatten(0, (2, -1)).unbind()


def _matmul_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor, list[slice]]:
    """All ranks' rows (made up, as numbers do not matter), their gradient, a tile, and the spans of the tiles."""
    rows = len(z) * collectives.world_size()
    unit = F.normalize(z.detach(), dim=1).repeat(collectives.world_size(), 1)
    spans = [slice(start, min(start + TILE, rows)) for start in range(0, rows, TILE)]
    return unit, torch.zeros_like(unit), torch.empty(TILE, TILE), spans
