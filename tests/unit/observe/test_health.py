import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray.observe import health
from simclr_ray.observe.health import alignment, contrastive_accuracy, rankme, uniformity


@pytest.fixture(params=[3, 2048], ids=["small tiles", "one tile"])
def tile(request, monkeypatch):
    """Run a law with tiles smaller than the data, uneven at the end, and with one tile."""
    monkeypatch.setattr(health, "_TILE", request.param)


def gaussian(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_rankme_of_the_identity_is_its_size():
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-4)


def test_rankme_of_orthonormal_columns_is_their_number():
    q, _ = torch.linalg.qr(gaussian(50, 7))
    assert rankme(5 * q) == pytest.approx(7, rel=1e-4)


def test_rankme_of_one_line_is_one():
    assert rankme(gaussian(40, 1) @ gaussian(1, 12)) == pytest.approx(1, abs=1e-4)


def test_rankme_of_two_unequal_directions_is_the_entropy_of_their_shares():
    p = torch.tensor([0.75, 0.25])
    assert rankme(torch.diag(3 * p)) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-5)


def test_rankme_of_a_collapsed_encoder_is_one_and_of_a_diverged_one_nan():
    assert rankme(torch.ones(30, 8)) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.zeros(30, 8)) == pytest.approx(1, abs=1e-4)
    assert math.isnan(rankme(torch.full((3, 2), math.nan)))


def test_alignment_is_zero_for_equal_views_at_any_scale():
    x = gaussian(20, 5)
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("alpha", "expected"), [(1, 2.0), (2, 4.0)])
def test_alignment_of_opposite_views_is_the_diameter_to_the_power(alpha, expected):
    x = gaussian(20, 5)
    assert alignment(x, -x, alpha=alpha) == pytest.approx(expected)


def test_alignment_of_orthogonal_views_is_two():
    assert alignment(torch.eye(4), torch.eye(4).roll(1, 0)) == pytest.approx(2)


@pytest.mark.usefixtures("tile")
def test_uniformity_of_one_point_is_zero():
    assert uniformity(torch.ones(7, 3)) == pytest.approx(0, abs=1e-5)


def test_uniformity_of_two_opposite_points_is_minus_four_t():
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]]), t=3) == pytest.approx(-12)


@pytest.mark.usefixtures("tile")
def test_uniformity_of_an_orthonormal_set_is_minus_two_t():
    assert uniformity(4 * torch.eye(8)) == pytest.approx(-4, abs=1e-5)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("n", [2, 3, 4, 10])
def test_uniformity_agrees_with_the_papers_code(n):
    x = gaussian(n, 6)
    twin = torch.pdist(F.normalize(x, dim=1)).pow(2).mul(-2).exp().mean().log()
    assert uniformity(x) == pytest.approx(float(twin), abs=1e-5)


def test_uniformity_of_many_points_on_the_sphere_is_that_of_the_sphere():
    # On S^2 a.b is uniform on [-1, 1], so E exp(2t(a.b - 1)) = (1 - exp(-4t)) / 4t.
    t = 2.0
    assert uniformity(gaussian(3000, 3), t=t) == pytest.approx(math.log((1 - math.exp(-4 * t)) / (4 * t)), abs=0.02)


@pytest.mark.usefixtures("tile")
def test_contrastive_accuracy_of_equal_views_is_one():
    x = gaussian(11, 6)
    assert contrastive_accuracy(x, 2 * x) == 1


@pytest.mark.usefixtures("tile")
def test_contrastive_accuracy_of_swapped_views_is_zero():
    assert contrastive_accuracy(torch.eye(8), torch.eye(8).roll(1, 0)) == 0


@pytest.mark.usefixtures("tile")
def test_contrastive_accuracy_of_a_collapsed_encoder_is_chance():
    assert contrastive_accuracy(torch.ones(10, 4), torch.ones(10, 4)) == pytest.approx(0.1)


@pytest.mark.usefixtures("tile")
def test_contrastive_accuracy_agrees_with_the_full_matrix():
    a, b = gaussian(50, 4), gaussian(50, 4) + 0.7 * gaussian(50, 4, seed=1)
    cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    own = torch.arange(50)
    twin = torch.cat([cosine.argmax(1) == own, cosine.argmax(0) == own]).double().mean()
    assert 0 < float(twin) < 1
    assert contrastive_accuracy(a, b) == pytest.approx(float(twin))
