"""The loss of SimCLR v2's distillation: a student's softmax against its teacher's (arXiv 2006.10029, eq. 2 and 3).

For an image with teacher logits t and student logits s, at temperature T (google-research/simclr has the factor T^2,
which keeps the gradient's size):

    L = -T^2 sum_y softmax(t / T)_y log softmax(s / T)_y

and where some images have labels, alpha L of all images + (1 - alpha) times the cross entropy of those. The loss is
the mean over the global batch, on every rank, scaled as `nt_xent` scales its own for data parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray.collectives import all_reduce_sum, world_size
from simclr_ray.learn.nt_xent import NTXent


def distillation(
    outputs: Tensor, *, temperature: float, rows: int, labels: Tensor | None = None, alpha: float = 1.0
) -> NTXent:
    """Loss of one step.

    Args:
        outputs: (n, 2 C): the student's logits, then the teacher's, of this rank's rows.
        temperature: Of both softmaxes.
        rows: Of all ranks.
        labels: (n,) int64, -1 where an image has none; None: no image has.
        alpha: Weight of the teacher beside labels.

    Returns:
        The loss in the place of NT-Xent's. `accuracy` is the share of rows in which student and teacher choose the same
        class, `entropy` the student's, `positive_similarity` the mean cosine of their logits; there are no negatives.
    """
    student, teacher = outputs.float().chunk(2, dim=1)
    teacher = teacher.detach()
    wanted = F.softmax(teacher / temperature, dim=1)
    each = -(temperature**2) * (wanted * F.log_softmax(student / temperature, dim=1)).sum(dim=1)
    loss = each.sum() / rows
    if labels is not None:
        known = labels >= 0
        count = all_reduce_sum(known.sum().float()).clamp(min=1)
        loss = alpha * loss + (1 - alpha) * F.cross_entropy(student[known], labels[known], reduction="sum") / count
    told = student.detach()
    own = F.log_softmax(told, dim=1)
    sums = torch.stack([
        loss.detach(),
        (told.argmax(dim=1) == teacher.argmax(dim=1)).sum() / rows,
        -(own.exp() * own).sum() / rows,
        F.cosine_similarity(told, teacher, dim=1).sum() / rows,
    ])  # fmt: skip
    total, agreement, entropy, similarity = all_reduce_sum(sums).unbind()
    # Its value is the global one, its gradient W times this rank's part: data parallel takes the mean.
    scaled = loss * world_size()
    scaled = scaled + (total - scaled.detach())
    bad = (~torch.isfinite(told).all(dim=1)).sum().reshape(1)
    return NTXent(scaled, agreement, entropy, similarity, torch.zeros_like(similarity), all_gather_counts(bad))


def all_gather_counts(count: Tensor) -> Tensor:
    """(1,) of each rank -> (W,), by a sum of one-hot rows."""
    from simclr_ray.collectives import rank

    out = torch.zeros(world_size(), device=count.device)
    out[rank()] = count[0]
    return all_reduce_sum(out)
