"""The linear probe: how well a linear classifier reads the labels off frozen embeddings.

Multinomial logistic regression by full-batch L-BFGS, as SimCLR's transfer protocol does it (Chen et al. 2020, appendix
B.8), with the strength of the L2 penalty chosen on a hold-out of the training labels. Test labels are looked at
once, after every choice is made. Everything random is addressed by (seed, purpose), so a result can be had again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate.knn import check_labelled, check_same_width

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Penalties tried by default. On raw Fashion-MNIST pixels the best was 0.1 to 1 for 100 labels, 0.1 for 1,000, 0.01 for
20,000; 10 was worse for each."""

PAPER_L2_GRID = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))
"""SimCLR's transfer protocol (appendix B.8): 45 values, evenly spaced in their logarithm, from 1e-6 to 1e5."""

_DEVIATION_FLOOR = 0.1  # of the median deviation; see _standardise
_MAX_ITERATIONS = 300
_GRADIENT_TOLERANCE = 1e-5  # of the mean loss; below it, float32 rounding moves the accuracy more than the fit does


@dataclass(frozen=True)
class HoldoutScore:
    """One penalty on the hold-out."""

    l2: float
    loss: float
    """Mean cross-entropy; what the choice goes by."""
    top1: float


@dataclass(frozen=True)
class ProbeResult:
    """One probe: its accuracy and the choices behind it."""

    top1: float
    """Fraction of test embeddings classified correctly."""
    l2: float
    """The penalty chosen."""
    holdout: tuple[HoldoutScore, ...]
    """The penalties tried, strongest first; empty when there was no choice."""


@dataclass(frozen=True)
class ProbeSummary:
    """Probes that differ only in their seed."""

    mean: float
    spread: float
    """Sample standard deviation over the seeds; NaN for one seed."""
    values: tuple[float, ...]
    """The accuracy of each seed, in the order given."""


def probe_over_seeds(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    seeds: Sequence[int],
    num_labels: int | None = None,
    l2_grid: Sequence[float] = L2_GRID,
    holdout_fraction: float = 0.2,
) -> ProbeSummary:
    """Run `linear_probe` once a seed; each seed draws its own labelled subset and its own hold-out.

    Args:
        train_h: training embeddings, (n, d).
        train_y: training labels, (n,), integers in [0, num_classes).
        test_h: test embeddings, (m, d).
        test_y: test labels, (m,).
        num_classes: classes of the task, also those a small subset may lack.
        seeds: at least one; the spread needs two.
        num_labels: size of the class-balanced labelled subset; None uses every label.
        l2_grid: penalties to choose from.
        holdout_fraction: share of the labels held out for the choice.

    Raises:
        DataError: the sets do not fit, or a class has too few labels.
        ConfigError: an argument is out of range.
    """
    if not seeds:
        raise ConfigError("a probe needs at least one seed", where="seeds")
    train_h, train_y = check_labelled(train_h, train_y, where="training embeddings")
    values = []
    for seed in seeds:
        chosen = _everything(train_y) if num_labels is None else balanced_subset(train_y, num_labels, num_classes, seed)
        result = linear_probe(
            train_h[chosen],
            train_y[chosen],
            test_h,
            test_y,
            num_classes=num_classes,
            seed=seed,
            l2_grid=l2_grid,
            holdout_fraction=holdout_fraction,
        )
        values.append(result.top1)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return ProbeSummary(mean=statistics.fmean(values), spread=spread, values=tuple(values))


def linear_probe(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    seed: int,
    l2_grid: Sequence[float] = L2_GRID,
    holdout_fraction: float = 0.2,
) -> ProbeResult:
    """Fit a linear classifier on embeddings and measure it once on the test set.

    Features are standardised with the training set's statistics. Of several penalties, each is fitted on
    1 - holdout_fraction of the labels, strongest first, until the loss on the rest rises; the best is fitted again on
    all labels. The loss decides, because the accuracy of a small hold-out is too coarse to. One penalty needs none.

    Args:
        train_h: training embeddings, (n, d).
        train_y: training labels, (n,), integers in [0, num_classes).
        test_h: test embeddings, (m, d).
        test_y: test labels, (m,).
        num_classes: classes of the task.
        seed: draws the hold-out.
        l2_grid: penalties l2 of `mean cross-entropy + l2/2 ||W||^2`; > 0; scikit-learn's C is 1 / (n l2).
        holdout_fraction: in (0, 1).

    Raises:
        DataError: the sets do not fit, a label is out of range, or there are too few labels for a hold-out.
        ConfigError: an argument is out of range.
    """
    train_h, train_y = check_labelled(train_h, train_y, where="training embeddings")
    test_h, test_y = check_labelled(test_h, test_y, where="test embeddings")
    check_same_width(train_h, test_h)
    _check_arguments(train_y, num_classes, l2_grid, holdout_fraction)
    train_x, test_x = _standardise(train_h, test_h)
    penalties = sorted(set(l2_grid), reverse=True)
    start = torch.zeros(train_x.shape[1] + 1, num_classes, device=train_x.device)
    l2, scores = penalties[0], list[HoldoutScore]()
    if len(penalties) > 1:
        held = _holdout(train_y, holdout_fraction, seed)
        scores, start = _try_penalties(
            train_x[~held], train_y[~held], train_x[held], train_y[held], penalties=penalties, start=start
        )
        l2 = min(scores, key=lambda score: score.loss).l2
    parameters = fit_softmax(train_x, train_y, l2=l2, start=start)
    return ProbeResult(top1=_top1(test_x, test_y, parameters), l2=l2, holdout=tuple(scores))


def fit_softmax(x: Tensor, y: Tensor, *, l2: float, start: Tensor) -> Tensor:
    """Minimise `softmax_objective` by full-batch L-BFGS with a strong Wolfe line search.

    L-BFGS works on weights divided by an estimate of their inverse root curvature, (variance/C + l2)^-1/2 a feature
    for C classes at even odds. In principal axes that is close to the true curvature and takes 2 to 3 times fewer
    steps (20,000 x 784 pixels). It changes the path to the minimum, not the minimum.

    Args:
        x: centred features, (n, d).
        y: labels, (n,).
        l2: penalty on the weights, > 0.
        start: parameters to start from, (d + 1, num_classes); not changed.

    Returns:
        Parameters, (d + 1, num_classes); the last row is the bias.
    """
    num_classes = start.shape[1]
    curvature = torch.cat([x.square().mean(dim=0) / num_classes + l2, x.new_tensor([1 / num_classes])])
    scale = curvature.rsqrt().unsqueeze(1)  # (d + 1, 1)
    scaled = (start / scale).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        objective = softmax_objective(x, y, scale * scaled, l2=l2)
        objective.backward()  # type: ignore[no-untyped-call]
        return float(objective.detach())

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return (scale * scaled).detach()


def softmax_objective(x: Tensor, y: Tensor, parameters: Tensor, *, l2: float) -> Tensor:
    """Mean cross-entropy plus l2/2 times the squared weights; the bias is free.

    Args:
        x: features, (n, d).
        y: labels, (n,).
        parameters: (d + 1, num_classes); the last row is the bias.
        l2: penalty, >= 0.
    """
    return F.cross_entropy(_logits(x, parameters), y) + 0.5 * l2 * parameters[:-1].square().sum()


def balanced_subset(y: Tensor, num_labels: int, num_classes: int, seed: int) -> Tensor:
    """Draw row numbers with equally many labels a class; a remainder goes to classes drawn by the seed.

    Args:
        y: labels, (n,), integers in [0, num_classes).
        num_labels: how many to draw, at least one a class.
        num_classes: classes to draw from.
        seed: the same seed draws the same rows.

    Returns:
        Row numbers, (num_labels,), ascending.

    Raises:
        ConfigError: fewer labels than classes.
        DataError: a class has too few rows.
    """
    if num_labels < num_classes:
        raise ConfigError(
            "a class-balanced subset needs a label of every class",
            where="num_labels",
            got=num_labels,
            expected=f"at least {num_classes}",
        )
    generator = _generator(seed, "labelled subset")
    share, extra = divmod(num_labels, num_classes)
    gets_one_more = set(torch.randperm(num_classes, generator=generator)[:extra].tolist())
    picked = []
    for label in range(num_classes):
        rows = (y == label).nonzero().flatten()
        wanted = share + (label in gets_one_more)
        if len(rows) < wanted:
            raise DataError(
                f"class {label} has too few labels for a balanced subset of {num_labels}",
                where="num_labels",
                got=len(rows),
                expected=f"at least {wanted}",
                fix="use fewer labels, or all of them",
            )
        order = torch.randperm(len(rows), generator=generator)[:wanted]
        picked.append(rows[order.to(rows.device)])
    return torch.cat(picked).sort().values


def _holdout(y: Tensor, fraction: float, seed: int) -> Tensor:
    """Draw a hold-out mask (n,) class by class, leaving at least one row of each class to fit on."""
    generator = _generator(seed, "hold-out")
    held = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for label in range(int(y.max()) + 1):
        rows = (y == label).nonzero().flatten()
        count = max(0, min(max(1, round(fraction * len(rows))), len(rows) - 1))
        order = torch.randperm(len(rows), generator=generator)[:count]
        held[rows[order.to(rows.device)]] = True
    if not bool(held.any()):
        raise DataError(
            "too few labels to hold some out for the choice of the penalty",
            where="training embeddings",
            got=f"{len(y)} labels, no class with two",
            fix="use two labels a class or more, or give l2_grid one value",
        )
    return held


def _try_penalties(
    fit_x: Tensor, fit_y: Tensor, held_x: Tensor, held_y: Tensor, *, penalties: Sequence[float], start: Tensor
) -> tuple[list[HoldoutScore], Tensor]:
    """Score penalties on the hold-out, strongest first, until its loss rises.

    Each fit starts from the one before. The hold-out loss falls and then rises along this path, and the weak penalties
    after the turn are by far the slowest to fit, so they are left out.

    Returns:
        The scores, and the parameters of the one with the least loss.
    """
    scores: list[HoldoutScore] = []
    best = parameters = start
    for l2 in penalties:
        parameters = fit_softmax(fit_x, fit_y, l2=l2, start=parameters)
        loss = float(F.cross_entropy(_logits(held_x, parameters), held_y))
        scores.append(HoldoutScore(l2=l2, loss=loss, top1=_top1(held_x, held_y, parameters)))
        if len(scores) > 1 and loss >= scores[-2].loss:
            break
        best = parameters
    return scores, best


def _standardise(train_h: Tensor, test_h: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and scale features with the training set's statistics, then turn them into its principal axes.

    A deviation counts as at least 0.1 times the median one: a feature that hardly varies in training (a corner pixel)
    must not be blown up into noise. With 100 labels of raw Fashion-MNIST pixels that is worth 5 points of accuracy,
    with 20,000 nothing. A feature that does not vary at all (a dead unit) becomes zero, in the test set too. The
    rotation leaves penalty and minimum as they are; it makes `fit_softmax` fast.
    """
    deviation, mean = torch.std_mean(train_h, dim=0, correction=0)  # (d,) each
    varies = deviation > 1e-6 * train_h.abs().amax(dim=0)  # what is below is float32 rounding of a constant
    scale = torch.full_like(deviation, math.inf)
    if bool(varies.any()):
        floor = _DEVIATION_FLOOR * deviation[varies].median()
        scale[varies] = torch.maximum(deviation[varies], floor)
    train_x, test_x = (train_h - mean) / scale, (test_h - mean) / scale
    _, axes = torch.linalg.eigh(train_x.T @ train_x / len(train_x))  # (d, d)
    return train_x @ axes, test_x @ axes


def _logits(x: Tensor, parameters: Tensor) -> Tensor:
    return torch.addmm(parameters[-1], x, parameters[:-1])  # (n, num_classes)


@torch.no_grad()
def _top1(x: Tensor, y: Tensor, parameters: Tensor) -> float:
    return float((_logits(x, parameters).argmax(dim=1) == y).double().mean())


def _everything(y: Tensor) -> Tensor:
    return torch.arange(len(y), device=y.device)


def _generator(seed: int, purpose: str) -> torch.Generator:
    digest = blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _check_arguments(train_y: Tensor, num_classes: int, l2_grid: Sequence[float], holdout_fraction: float) -> None:
    if int(train_y.max()) >= num_classes:
        raise DataError("a label lies outside the classes", got=int(train_y.max()), expected=f"0 to {num_classes - 1}")
    if not l2_grid or not all(0 < l2 < math.inf for l2 in l2_grid):
        raise ConfigError("the penalties must be finite and > 0", where="l2_grid", got=tuple(l2_grid))
    if not 0 < holdout_fraction < 1:
        raise ConfigError("the hold-out is a share of the labels", where="holdout_fraction", got=holdout_fraction)
