"""Single rows of NT-Xent: from projections to unit rows, from an anchor's sums to its loss, statistics and gradient.

Everything here is linear in the number of anchors; the pairs are in `learn.tiles`. Rows are by view, (2, n, ...).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from simclr_ray.learn.tiles import RowSums

_SMALLEST_NORM = 1e-6
"""Rows shorter than this count as dead: F.normalize's 1e-12 would hand them gradients of 1e11."""
_SMALLEST_PEAK = 1e-30
_TIE_ULPS = 16


class Facts(NamedTuple):
    """What this rank's anchors add up to; (2, n) float64 unless said otherwise."""

    losses: Tensor
    hits: Tensor
    entropy: Tensor
    positive: Tensor
    """(n,) cosine similarity of the two views."""
    normalizer: Tensor
    """In the projections' dtype; see `Kernel.own_gradient`."""
    pull: Tensor
    """(n,) in the projections' dtype: q of both views, with which an image's views attract each other."""


def facts_of(sums: RowSums, unit: Tensor, temperature: float, *, wide: bool) -> Facts:
    """Put the sums over this rank's negatives, (2, n), and its positives together."""
    same, cross, cross_times_logit = sums.totals.unbind()
    same_shift, cross_shift = sums.shift.double().unbind()
    positive = row_dots(unit[0], unit[1])  # (n,)
    logit = (positive / temperature).double()
    log_cross = cross.log() + cross_shift
    x = torch.logaddexp(same.log() + same_shift, log_cross) - logit
    losses = torch.logaddexp(x, x.new_zeros(()))  # softplus; F.softplus turns into x itself from 20 on
    # Over the other view's B projections, the positive among them.
    candidates = torch.logaddexp(log_cross, logit)
    mean_logit = cross_times_logit * (cross_shift - candidates).exp() + logit * (logit - candidates).exp()
    # lse_i = s_positive + softplus(x_i), which keeps its precision where either part vanishes.
    lse = logit + losses
    # Two ways to the same dot product differ by some ulps; a lead of so little is a tie, as among collapsed rows.
    tie = _TIE_ULPS * torch.finfo(unit.dtype).eps / temperature
    return Facts(
        losses=losses,
        hits=(positive / temperature > sums.hardest + tie).double(),
        entropy=candidates - mean_logit,
        positive=positive.double(),
        normalizer=(lse if wide else (-lse).exp()).to(unit.dtype),
        pull=x.sigmoid().sum(dim=0).to(unit.dtype),
    )


def own_numbers(facts: Facts, norm: Tensor, unit: Tensor) -> Tensor:
    """What a rank tells the others of its anchors: (6 + D,) float64, which `global_numbers` understands."""
    scalars = [
        facts.losses.sum(),
        facts.hits.sum(),
        facts.entropy.sum(),
        2 * facts.positive.sum(),
        (row_dots(unit[0], unit[0]) + row_dots(unit[1], unit[1])).sum(dtype=torch.float64),
        (~torch.isfinite(norm)).sum(dtype=torch.float64),
    ]
    return torch.cat([torch.stack(scalars), unit.sum(dim=(0, 1)).double()])


def global_numbers(everyone: Tensor, anchors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics (4,) in the order of `NTXent`, and non-finite rows by rank, from all `own_numbers` (W, 6 + D).

    The negatives' mean similarity needs no look at the pairs: all similarities together are |sum of z|^2.
    """
    total = everyone.sum(dim=0)  # in rank order, so alike on all ranks to the bit
    loss, hits, entropy, positives, squares = (total[i] / anchors for i in range(5))
    pairs = anchors * (anchors - 2)
    negative = (total[6:].square().sum() - (squares + positives) * anchors) / pairs
    return loss, torch.stack([hits, entropy, positives, negative]), everyone[:, 5].clone()


def finish_gradient(gradient: Tensor, unit: Tensor, norm: Tensor, pull: Tensor, scale: float) -> None:
    """Add the positives' part to the sums over negatives, and go back through the normalization; in place."""
    inverse = torch.where(norm < _SMALLEST_NORM, 0.0, scale / norm)  # dead rows get no gradient
    for view in (0, 1):
        of_view, z = gradient[view], unit[view]
        of_view.addcmul_(pull[:, None], unit[1 - view], value=-1.0)
        of_view.addcmul_(row_dots(of_view, z)[:, None], z, value=-1.0).mul_(inverse[view])


def normalize(z: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows by view, (2, n, D), in float32 or wider, and |z|, (2, n, 1). NaN stays NaN, infinity becomes NaN.

    Dead rows become zero. By the largest number first, for squares of bfloat16's larger half overflow.
    """
    z = z.detach().to(compute_dtype(z)).view(2, len(z) // 2, z.shape[1])
    if not z.numel():
        return z.contiguous(), z.new_zeros((*z.shape[:2], 1))
    peak = torch.linalg.vector_norm(z, math.inf, dim=2, keepdim=True)
    unit = torch.div(z, peak.clamp_min(_SMALLEST_PEAK), out=torch.empty(z.shape, dtype=z.dtype, device=z.device))
    length = torch.linalg.vector_norm(unit, dim=2, keepdim=True).clamp_min(1.0)  # 1 to sqrt(D), unless dead
    norm = peak * length
    unit.mul_(torch.where(norm < _SMALLEST_NORM, 0.0, 1.0 / length))
    return unit, torch.where(torch.isfinite(peak), norm.clamp_max(torch.finfo(norm.dtype).max), norm)


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """x_i . y_i of (n, D) each, without an (n, D) temporary."""
    return torch.bmm(x.unsqueeze(1), y.unsqueeze(2)).flatten()


def compute_dtype(z: Tensor) -> torch.dtype:
    """Float32 or wider."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32
