"""NT-Xent as the paper writes it: the obvious twin that tests compare the production loss (`learn.nt_xent`) with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """SimCLR (arXiv 2002.05709), Eq. 1 and Algorithm 1, on one process. Slow, obvious, holds the whole matrix.

    Args:
        z: Projections, (2B, D), ordered [views a; views b]; need not be normalized.
        temperature: Divides the cosine similarities.

    Returns:
        Mean loss over the 2B anchors, 0-dim, in float32 or wider.
    """
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        similarity = unit @ unit.T / temperature  # (2B, 2B)
        similarity.fill_diagonal_(-math.inf)  # an anchor is not its own negative
        positive = torch.arange(len(z), device=z.device).roll(len(z) // 2)
        return F.cross_entropy(similarity, positive)
