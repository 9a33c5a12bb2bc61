import math
import statistics

import pytest
import torch
from torch import Tensor

from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate.linear import (
    balanced_subset,
    fit_softmax,
    linear_probe,
    probe_over_seeds,
    softmax_objective,
)


def blobs(n: int, *, d: int = 10, classes: int = 4, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes at the unit vectors, features of different scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.eye(classes, d)[y] + noise * torch.randn(n, d, generator=generator)
    return x * torch.logspace(-0.5, 0.5, d) + 5, y


def test_a_separable_set_is_separated():
    result = linear_probe(*blobs(200, noise=0.05), *blobs(80, noise=0.05, seed=1), num_classes=4, seed=0)
    assert result.top1 == 1


def test_labels_without_a_pattern_give_chance():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1000, 5, generator=generator)
    y = torch.randint(0, 4, (1000,), generator=generator)
    result = linear_probe(h[:500], y[:500], h[500:], y[500:], num_classes=4, seed=0)
    assert result.top1 == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_fit_beats_a_long_plain_gradient_descent_and_is_flat(l2):
    x, y = blobs(120)
    x = (x - x.mean(0)) / x.std(0)
    fitted = fit_softmax(x, y, l2=l2, start=torch.zeros(11, 4)).double().requires_grad_()
    twin = torch.zeros(11, 4, dtype=torch.double, requires_grad=True)
    for _ in range(500):
        (gradient,) = torch.autograd.grad(softmax_objective(x.double(), y, twin, l2=l2), twin)
        with torch.no_grad():
            twin -= 0.5 * gradient
    objective = softmax_objective(x.double(), y, fitted, l2=l2)
    (slope,) = torch.autograd.grad(objective, fitted)
    assert objective.item() <= softmax_objective(x.double(), y, twin, l2=l2).item() + 1e-6
    assert float(slope.abs().max()) < 1e-4


def test_the_minimum_does_not_depend_on_the_start():
    x, y = blobs(120)
    x = (x - x.mean(0)) / x.std(0)
    near, far = (fit_softmax(x, y, l2=0.01, start=start) for start in (torch.zeros(11, 4), torch.ones(11, 4) * 2))
    assert torch.allclose(near[:-1], far[:-1], atol=2e-3)


def test_it_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the twin of this test only")
    (train_h, train_y), (test_h, test_y) = blobs(800), blobs(2000, seed=1)
    l2 = 1e-2
    ours = linear_probe(train_h, train_y, test_h, test_y, num_classes=4, seed=0, l2_grid=[l2])
    mean, deviation = train_h.mean(0), train_h.std(0, correction=0)
    twin = linear_model.LogisticRegression(C=1 / (len(train_h) * l2), max_iter=5000, tol=1e-8)
    twin.fit(((train_h - mean) / deviation).numpy(), train_y.numpy())
    expected = twin.score(((test_h - mean) / deviation).numpy(), test_y.numpy())
    assert 0.3 < expected < 0.99
    assert ours.top1 == pytest.approx(expected, abs=0.01)


def test_the_seed_decides_the_hold_out_and_nothing_else_does():
    args = (*blobs(150), *blobs(60, seed=1))
    first, again, other = (linear_probe(*args, num_classes=4, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.holdout != other.holdout


def test_the_penalty_with_the_least_hold_out_loss_wins_and_the_search_stops_after_it():
    grid = [1e-4, 1e-1, 1, 1e-3]
    result = linear_probe(*blobs(60, noise=2.0), *blobs(60, seed=1), num_classes=4, seed=0, l2_grid=grid)
    penalties = [score.l2 for score in result.holdout]
    losses = [score.loss for score in result.holdout]
    assert penalties == [1, 1e-1, 1e-3, 1e-4][: len(penalties)]
    assert len(penalties) < len(grid)
    assert result.l2 == penalties[losses.index(min(losses))]
    assert losses[:-1] == sorted(losses[:-1], reverse=True)


def test_a_feature_that_hardly_varies_in_training_is_not_blown_up():
    (train_h, train_y), (test_h, test_y) = blobs(100, noise=0.05), blobs(400, noise=0.05, seed=1)
    train_h[:, 9] = 5 + 1e-4 * torch.arange(100)
    test_h[:, 9] = 5 + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(2))
    assert linear_probe(train_h, train_y, test_h, test_y, num_classes=4, seed=0).top1 > 0.95


def test_one_penalty_needs_no_hold_out():
    args = (torch.eye(2), torch.tensor([0, 1]))
    assert linear_probe(*args, *args, num_classes=2, seed=0, l2_grid=[1e-2]).holdout == ()
    with pytest.raises(DataError, match="two labels a class"):
        linear_probe(*args, *args, num_classes=2, seed=0)


def test_constant_features_do_no_harm():
    (train_h, y), (test_h, test_y) = blobs(100, noise=0.05), blobs(40, noise=0.05, seed=1)
    train_h[:, 5], test_h[:, 5] = 7, -7
    train_h[:, 6], test_h[:, 6] = 0, 0
    assert linear_probe(train_h, y, test_h, test_y, num_classes=4, seed=0).top1 == 1
    constant = torch.ones(100, 3)
    assert linear_probe(constant, y, constant[:40], test_y, num_classes=4, seed=0).top1 == pytest.approx(0.25)


def test_a_summary_is_the_mean_and_sample_deviation_of_its_seeds():
    summary = probe_over_seeds(
        *blobs(300), *blobs(100, seed=1), num_classes=4, seeds=[5, 6, 7], num_labels=40, l2_grid=[1.0, 0.1]
    )
    assert len(set(summary.values)) > 1, "each seed draws its own labels"
    assert summary.mean == pytest.approx(statistics.fmean(summary.values))
    assert summary.spread == pytest.approx(statistics.stdev(summary.values))


def test_one_seed_has_no_spread():
    summary = probe_over_seeds(*blobs(80), *blobs(40, seed=1), num_classes=4, seeds=[0], l2_grid=[0.1])
    assert math.isnan(summary.spread)
    assert summary.values == (summary.mean,)


@pytest.mark.parametrize("num_labels", [4, 41, 42, 43, 44])
def test_a_subset_is_balanced_distinct_and_addressed_by_its_seed(num_labels):
    y = torch.tensor([0] * 90 + [1] * 11 + [2] * 30 + [3] * 30)
    rows = balanced_subset(y, num_labels, num_classes=4, seed=1)
    counts = torch.bincount(y[rows], minlength=4)
    assert len(set(rows.tolist())) == num_labels
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(rows, balanced_subset(y, num_labels, num_classes=4, seed=1))
    assert not torch.equal(rows, balanced_subset(y, num_labels, num_classes=4, seed=2))


def test_a_class_with_too_few_labels_is_named():
    with pytest.raises(DataError, match="class 1 has too few"):
        balanced_subset(torch.tensor([0, 0, 0, 1]), 4, num_classes=2, seed=0)
    with pytest.raises(ConfigError, match="at least 2"):
        balanced_subset(torch.tensor([0, 1]), 1, num_classes=2, seed=0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_classes": 3}, DataError),
        ({"l2_grid": []}, ConfigError),
        ({"l2_grid": [0.0]}, ConfigError),
        ({"l2_grid": [math.nan]}, ConfigError),
        ({"holdout_fraction": 1.0}, ConfigError),
        ({"test_h": torch.zeros(40, 3)}, DataError),
    ],
)
def test_unfit_arguments_are_named(arguments, error):
    (train_h, train_y), (test_h, test_y) = blobs(40), blobs(40)
    good = {"train_h": train_h, "train_y": train_y, "test_h": test_h, "test_y": test_y, "num_classes": 4, "seed": 0}
    with pytest.raises(error):
        linear_probe(**(good | arguments))


def test_no_seed_is_refused():
    with pytest.raises(ConfigError, match="seed"):
        probe_over_seeds(*blobs(40), *blobs(40), num_classes=4, seeds=[])
