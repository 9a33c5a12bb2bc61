"""NT-Xent, the SimCLR loss: one obvious reference, and its twin for projections spread over ranks.

SimCLR (arXiv 2002.05709), Eq. 1 and Algorithm 1. For a global batch of B images there are M = 2B anchors; an anchor's
positive is the other view of its image, its negatives are the other 2B - 2 projections. Similarity is cosine, divided
by the temperature. Both functions give the mean over all anchors as Algorithm 1 does; google-research/simclr *adds*
the means of the two directions, which is twice this number.

Invariant: whatever the number of ranks and however unevenly the images lie on them, the mean over ranks of the
parameter gradients (what distributed data parallel computes) is the gradient of the reference on the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from simclr_ray.collectives import all_gather_rows, all_reduce_sum, rank
from simclr_ray.errors import ConfigError

_SMALLEST_NORM = 1e-6
"""Rows shorter than this count as dead: F.normalize's 1e-12 would hand them gradients of 1e11."""


@dataclass(frozen=True, slots=True)
class NTXent:
    """The loss of one step and what it says about the representation. All fields are 0-dim tensors on z's device.

    Every field but `loss` is detached and the same on all ranks.
    """

    loss: Tensor
    """Call backward on this, outside autocast: sum over this rank's anchors times W / M.

    So the *mean over ranks* of its gradient is the gradient of `global_loss`.
    """
    global_loss: Tensor
    """Mean over all M anchors, in nats. log(2B - 1) for collapsed projections."""
    accuracy: Tensor
    """Share of anchors whose most similar projection among the B of the other view is their positive."""
    entropy: Tensor
    """Mean entropy, in nats, of an anchor's softmax over the B projections of the other view."""
    positive_similarity: Tensor
    """Mean cosine similarity of positives."""
    negative_similarity: Tensor
    """Mean cosine similarity of negatives."""


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Reference NT-Xent on one process: slow, obvious, Algorithm 1 line by line.

    Args:
        z: Projections, (2B, D), ordered [views a; views b]; need not be normalized.
        temperature: Divides the cosine similarities; finite and above 0.

    Returns:
        Mean loss over the 2B anchors, 0-dim, in float32 or wider.

    Raises:
        ConfigError: Fewer than two images, an odd number of rows, or a temperature out of range.
    """
    _check_temperature(temperature)
    _check_rows([len(z)])
    with torch.autocast(z.device.type, enabled=False):
        unit = _normalize_rows(z)
        similarity = unit @ unit.T / temperature  # (2B, 2B)
        similarity.fill_diagonal_(-math.inf)  # an anchor is not its own negative
        positive = torch.arange(len(z), device=z.device).roll(len(z) // 2)
        return F.cross_entropy(similarity, positive)


def distributed_nt_xent(z: Tensor, temperature: float, group: ProcessGroup | None = None) -> NTXent:
    """NT-Xent of this rank's anchors against the projections of all ranks.

    Computes in float32 (float64 for float64 input), also under autocast and for bf16 or fp16 input. A projection with
    norm below 1e-6 counts as zero and gets no gradient; a NaN anywhere makes every rank's loss NaN.

    Args:
        z: This rank's projections, (2n, D), ordered [views a; views b]; need not be normalized; n may differ by rank.
        temperature: Divides the cosine similarities; finite and above 0; the same on all ranks.
        group: Ranks that share the global batch; None = all. Works without a process group, as one rank.

    Returns:
        The loss to differentiate and the global statistics, see `NTXent`.

    Raises:
        ConfigError: Fewer than two images in the global batch, an odd number of rows on some rank, or a temperature
            out of range. Raised on all ranks alike.
    """
    _check_temperature(temperature)
    with torch.autocast(z.device.type, enabled=False):
        local = _normalize_rows(z)
        columns, counts = all_gather_rows(local, group)  # (M, D)
        _check_rows(counts)
        layout = _layout(counts, rank(group), z.device)
        logits = local @ columns.T / temperature  # (2n, M)
        positive = (local * local.roll(len(local) // 2, dims=0)).sum(dim=1)  # (2n,), cosine
        losses = _anchor_losses(logits, positive / temperature, layout)  # (2n,)
        statistics = _global_statistics(losses, logits, local, columns, positive, layout, group)
        loss = losses.sum() * (len(counts) / len(columns))
    return NTXent(loss, *statistics)


class _Layout(NamedTuple):
    """Where this rank's 2n anchors find their columns among the M gathered ones, [views a; views b] rank by rank."""

    self_column: Tensor  # (2n,)
    positive_column: Tensor  # (2n,)
    views: tuple[Tensor, Tensor]  # (B,) each: the columns of the views a, and of the views b
    image: Tensor  # (2n,), the anchor's image among the B


def _layout(counts: list[int], own: int, device: torch.device) -> _Layout:
    column = torch.arange(sum(counts), device=device)
    blocks = torch.split(column, counts)
    halves = [block.chunk(2) if len(block) else (block, block) for block in blocks]
    images = torch.split(column[: len(column) // 2], [count // 2 for count in counts])[own]
    return _Layout(
        self_column=blocks[own],
        positive_column=blocks[own].roll(counts[own] // 2),
        views=(torch.cat([a for a, _ in halves]), torch.cat([b for _, b in halves])),
        image=images.repeat(2),
    )


def _anchor_losses(logits: Tensor, positive_logit: Tensor, layout: _Layout) -> Tensor:
    """Loss of each anchor, (2n,): softplus(log-sum-exp of the negatives - positive).

    Equals cross entropy, but keeps the positive out of the sum: once positives win, cross entropy is the difference
    of two nearly equal numbers, and late in training at small temperatures its float32 gradient is rounding noise.
    """
    not_negative = torch.stack([layout.self_column, layout.positive_column], dim=1)
    negatives = logits.scatter(1, not_negative, -math.inf).logsumexp(dim=1)
    return F.softplus(negatives - positive_logit)


@torch.no_grad()
def _global_statistics(
    losses: Tensor,
    logits: Tensor,
    local: Tensor,
    columns: Tensor,
    positive: Tensor,
    layout: _Layout,
    group: ProcessGroup | None,
) -> tuple[Tensor, ...]:
    """Means over all M anchors of NTXent's detached fields, in their order, by one small all-reduce."""
    views_a, views_b = layout.views
    logits_a, logits_b = logits.tensor_split(2)
    # Candidates as in google-research/simclr (objective.py returns logits_ab): the other view only.
    log_p = torch.cat([logits_a[:, views_b], logits_b[:, views_a]]).log_softmax(dim=1)  # (2n, B)
    hits = log_p.argmax(dim=1) == layout.image
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    # A sum of cosines is the cosine with the sum: no second look at the (2n, M) matrix.
    negative = local @ columns.sum(dim=0) - local.square().sum(dim=1) - positive
    per_anchor = torch.stack([losses, hits.to(losses.dtype), entropy, positive, negative / (len(columns) - 2)])
    return (all_reduce_sum(per_anchor.sum(dim=1), group) / len(columns)).unbind()


def _normalize_rows(z: Tensor) -> Tensor:
    """Rows of `z` at length one, in float32 or wider; dead rows become zero and get zero gradient, NaN stays NaN."""
    z = z if z.dtype == torch.float64 else z.float()
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return torch.where(norm < _SMALLEST_NORM, 0.0, z / norm.clamp_min(_SMALLEST_NORM))


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(
            "cannot divide similarities by this temperature",
            where="loss.temperature",
            got=temperature,
            expected="a finite number above 0",
            fix="0.1 suits ImageNet, 0.5 CIFAR-10 (SimCLR, section 5.1 and appendix B.9)",
        )


def _check_rows(counts: list[int]) -> None:
    """`counts` holds every rank's number of rows, so that all ranks refuse together and none waits for the others."""
    if any(count % 2 for count in counts):
        raise ConfigError(
            "projections do not form view pairs",
            where="NT-Xent",
            got=f"{counts} rows by rank",
            expected="an even number of rows, [views a; views b]",
        )
    if sum(counts) < 4:
        raise ConfigError(
            "an anchor has no negatives",
            where="NT-Xent",
            got=f"a global batch of {sum(counts) // 2} images",
            expected="at least 2 images",
            fix="raise the global batch size",
        )
