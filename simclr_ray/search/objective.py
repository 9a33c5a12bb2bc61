"""What a checkpoint is worth: measures of its embeddings on the images of the search, with labels or without.

No measure is a loss. All that can be are computed for every score, so that a search can say how well the label-free
ones would have ranked its trials; one of them, made so that more is better, is the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from simclr_ray.config import EvaluateConfig
from simclr_ray.evaluate.encode import embed, load_encoder
from simclr_ray.evaluate.knn import knn_top1
from simclr_ray.evaluate.linear import linear_probe
from simclr_ray.observe.health import alignment, lidar, rankme, uniformity
from simclr_ray.search.probe import ProbeSet
from simclr_ray.search.space import LABELLED, MEASURES
from simclr_ray.views.policy import Policy

LOWER_IS_BETTER = ("alignment", "uniformity", "alignment_uniformity")
WORST = -1e9
"""Stands for a measure that is not a number, and for a trial that diverged: below whatever a measure can be, and
finite, for searchers and schedulers sort by it."""


def measures(
    encode: Callable[[Tensor], Tensor], probe: ProbeSet, policy: Policy, config: EvaluateConfig
) -> dict[str, float]:
    """Measure an encoder.

    `alignment_uniformity` is the sum of the two: up to the weight of the first, what the contrastive loss tends to with
    infinitely many negatives (Wang & Isola 2020, theorem 1), but on the same views, in the same scale, for all trials.

    Args:
        encode: (n, 3, S, S) -> embeddings (n, d).
        probe: Images and views.
        policy: How the encoder wants its input normalised.
        config: Of the kNN classifier.

    Returns:
        By name; those with labels only where `probe` has them. All NaN when an embedding is not finite.
    """
    labelled = probe.labels is not None
    names = [name for name in MEASURES if labelled or name not in LABELLED]
    h = embed(encode, probe.images, policy)  # (n, d)
    num_images, num_views = probe.views.shape[:2]
    of_views = embed(encode, probe.views.reshape(-1, *probe.views.shape[2:]), policy)
    of_views = of_views.reshape(num_images, num_views, -1)  # (n, q, d)
    voters = embed(encode, probe.voters, policy) if labelled else h[:0]
    if not all(bool(torch.isfinite(one).all()) for one in (h, of_views, voters)):
        return dict.fromkeys(names, math.nan)
    found = {
        "rankme": rankme(h),
        "lidar": lidar(of_views),
        "alignment": alignment(of_views[:, 0], of_views[:, 1]),
        "uniformity": uniformity(h),
    }
    found["alignment_uniformity"] = found["alignment"] + found["uniformity"]
    if probe.labels is not None:
        y, voters_y = torch.tensor(probe.labels), torch.tensor(probe.voters_labels)
        k = min(config.knn_k, len(voters))
        found["knn_top1"] = knn_top1(voters, voters_y, h, y, k=k, temperature=config.knn_temperature)
        classes = int(max(y.max(), voters_y.max())) + 1
        found["linear_top1"] = linear_probe(voters, voters_y, h, y, num_classes=classes, seed=0).top1
    return {name: found[name] for name in names}


def score_checkpoint(
    run: str, step: int, probe: ProbeSet, config: EvaluateConfig, cpus: float, gpus: float
) -> dict[str, float]:
    """Measure one checkpoint of a run; a Ray task."""
    torch.set_num_threads(max(1, int(cpus)))
    trained = load_encoder(run, step)
    device = torch.device("cuda" if gpus else "cpu")
    model = trained.model.to(device)
    return measures(lambda views: model.embed(views.to(device)).cpu(), probe, trained.policy, config)


def better_is_more(measure: str, value: float | None) -> float:
    """A measure as an objective: more is better, and what is no number is worst."""
    if value is None or not math.isfinite(value):
        return WORST
    return -value if measure in LOWER_IS_BETTER else value


def unbeaten(scores: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of these no other beats: at least as good in both and better in one (the Pareto front); more is better."""
    return [
        not any(a >= mine_a and b >= mine_b and (a, b) != (mine_a, mine_b) for a, b in scores)
        for mine_a, mine_b in scores
    ]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation (Spearman 1904): Pearson's, of ranks, ties at their mean rank.

    Returns:
        -1 to 1; NaN for fewer than 3 pairs or where one side is all ties.
    """
    assert len(x) == len(y)
    if len(x) < 3:
        return math.nan
    ranks = torch.stack([_ranks(x), _ranks(y)])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    norm = float(centred.norm(dim=1).prod())
    return float((centred[0] * centred[1]).sum()) / norm if norm > 0 else math.nan


def agreement(found: Sequence[Mapping[str, float | None]], labelled: str) -> dict[str, float]:
    """Spearman's rank correlation of each label-free measure with a labelled one, over trials; 1: the same order."""
    y = [better_is_more(labelled, one.get(labelled)) for one in found]
    return {
        name: spearman([better_is_more(name, one.get(name)) for one in found], y)
        for name in MEASURES
        if name not in LABELLED
    }


def _ranks(values: Sequence[float]) -> Tensor:
    v = torch.tensor(values, dtype=torch.float64)
    return ((v[:, None] > v).sum(dim=1) + (v[:, None] >= v).sum(dim=1)).double() / 2
