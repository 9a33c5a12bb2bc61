"""Laws of NT-Xent on one process. What ranks add is in test_distributed.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simclr_ray.errors import ConfigError
from simclr_ray.learn.nt_xent import distributed_nt_xent, nt_xent

images_and_dim = st.tuples(st.integers(2, 9), st.integers(1, 12))
temperatures = st.floats(0.05, 5.0)
seeds = st.integers(0, 2**31)


def projections(images: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2 * images, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(loss_of, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = loss_of(z)
    loss.backward()
    return loss.detach(), z.grad


def algorithm_1(z: Tensor, temperature: float) -> float:
    """SimCLR, Algorithm 1 and Eq. 1, one anchor after the other in plain Python."""
    rows, half = z.tolist(), len(z) // 2

    def s(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / (math.hypot(*rows[i]) * math.hypot(*rows[j]))

    def pair_loss(i: int, j: int) -> float:
        others = [math.exp(s(i, k) / temperature) for k in range(2 * half) if k != i]
        return -math.log(math.exp(s(i, j) / temperature) / sum(others))

    return sum(pair_loss(k, k + half) + pair_loss(k + half, k) for k in range(half)) / (2 * half)


@settings(deadline=None, max_examples=25)
@given(images_and_dim, temperatures, seeds)
def test_reference_is_algorithm_1(shape, temperature, seed):
    z = projections(*shape, seed)
    assert float(nt_xent(z, temperature)) == pytest.approx(algorithm_1(z, temperature), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(images_and_dim, temperatures, seeds)
def test_one_rank_without_a_group_is_the_reference_in_value_and_gradient(shape, temperature, seed):
    z = projections(*shape, seed)
    reference, reference_grad = gradient(lambda z: nt_xent(z, temperature), z)
    loss, grad = gradient(lambda z: distributed_nt_xent(z, temperature).loss, z)
    torch.testing.assert_close(loss, reference, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, reference_grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(distributed_nt_xent(z, temperature).global_loss, reference, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(images_and_dim.filter(lambda shape: shape[1] > 1), temperatures, seeds)  # on a line, accuracy is all ties
def test_the_order_of_images_and_of_views_does_not_matter(shape, temperature, seed):
    z = projections(*shape, seed)
    a, b = z.chunk(2)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    loss = distributed_nt_xent(z, temperature)
    for same in (torch.cat([a[order], b[order]]), torch.cat([b, a])):
        again = distributed_nt_xent(same, temperature)
        torch.testing.assert_close(again.loss, loss.loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(again.accuracy, loss.accuracy)
        torch.testing.assert_close(again.entropy, loss.entropy)


@settings(deadline=None, max_examples=25)
@given(images_and_dim, temperatures, seeds)
def test_the_length_of_a_projection_does_not_matter(shape, temperature, seed):
    z = projections(*shape, seed)
    lengths = torch.logspace(-2, 3, len(z), dtype=z.dtype)[:, None]
    for loss in (nt_xent, lambda z, t: distributed_nt_xent(z, t).loss):
        torch.testing.assert_close(loss(z * lengths, temperature), loss(z, temperature), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("images", [2, 3, 64])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_collapse_gives_log_of_candidates_and_no_gradient(images, temperature):
    z = torch.ones(2 * images, 8, dtype=torch.float64)
    loss, grad = gradient(lambda z: distributed_nt_xent(z, temperature).loss, z)
    assert float(loss) == pytest.approx(math.log(2 * images - 1), rel=1e-12)
    assert float(grad.abs().max()) < 1e-12
    collapsed = distributed_nt_xent(z, temperature)
    assert float(collapsed.entropy) == pytest.approx(math.log(images))
    assert float(collapsed.positive_similarity) == pytest.approx(1.0)
    assert float(collapsed.negative_similarity) == pytest.approx(1.0)


def test_perfect_projections_have_full_accuracy_and_vanishing_loss():
    perfect = distributed_nt_xent(torch.eye(8, dtype=torch.float64).repeat(2, 1), temperature=0.05)
    assert float(perfect.accuracy) == 1.0
    assert float(perfect.positive_similarity) == pytest.approx(1.0)
    assert float(perfect.negative_similarity) == pytest.approx(0.0, abs=1e-12)
    assert float(perfect.entropy) == pytest.approx(0.0, abs=1e-6)
    assert float(perfect.loss) == pytest.approx(math.log1p(14 * math.exp(-20)), rel=1e-9)


def test_accuracy_looks_at_the_other_view_only():
    # Within a view all images look alike (the nearest row of all is never the positive), across views they match.
    a = torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.1, 0.0]])
    b = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert float(distributed_nt_xent(torch.cat([a, b]), 0.1).accuracy) == 1.0
    assert float(distributed_nt_xent(torch.cat([a, b.flip(0)]), 0.1).accuracy) == 0.0


def test_statistics_are_the_means_they_are_named_after():
    z = projections(5, 4)
    unit = torch.nn.functional.normalize(z)
    cosine = unit @ unit.T
    positive = cosine.diagonal(5)
    negative = (cosine.sum() - cosine.trace() - 2 * positive.sum()) / (10 * 8)
    cross = torch.distributions.Categorical(logits=torch.cat([cosine[:5, 5:], cosine[5:, :5]]) / 0.3)
    result = distributed_nt_xent(z, 0.3)
    torch.testing.assert_close(result.positive_similarity, positive.mean())
    torch.testing.assert_close(result.negative_similarity, negative)
    torch.testing.assert_close(result.entropy, cross.entropy().mean())
    for name in ("global_loss", "accuracy", "entropy", "positive_similarity", "negative_similarity"):
        assert not getattr(result, name).requires_grad
        assert getattr(result, name).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_temperature_one_hundredth(dtype):
    z = torch.cat([projections(16, 32, dtype=dtype), torch.eye(32, dtype=dtype).repeat(2, 1)])
    for loss_of in (lambda z: distributed_nt_xent(z, 0.01).loss, lambda z: nt_xent(z, 0.01)):
        loss, grad = gradient(loss_of, z)
        assert loss.dtype == torch.float32
        assert grad.dtype == dtype
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


def test_autocast_does_not_reach_the_logits():
    z = projections(16, 32, dtype=torch.float32)
    outside, outside_grad = gradient(lambda z: distributed_nt_xent(z, 0.1).loss, z)

    def under_autocast(z: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(nt_xent(z, 0.1), outside)
            return distributed_nt_xent(z, 0.1).loss

    inside, inside_grad = gradient(under_autocast, z)
    assert torch.equal(inside, outside)
    assert torch.equal(inside_grad, outside_grad)


def test_float32_gradient_survives_won_positives_at_small_temperature():
    # Late in training: cross entropy's float32 gradient is off by 0.3 here, because p - 1 cancels.
    views = projections(64, 64, dtype=torch.float32)
    z = torch.cat([views[:64], views[:64] + 0.05 * views[64:]])
    _, exact = gradient(lambda z: distributed_nt_xent(z, 0.02).loss, z.double())
    _, grad = gradient(lambda z: distributed_nt_xent(z, 0.02).loss, z)
    assert float((grad.double() - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_row_gets_no_gradient_and_does_not_disturb(dtype):
    z = projections(4, 8, dtype=dtype)
    z[3] = 0.0
    loss, grad = gradient(lambda z: distributed_nt_xent(z, 0.1).loss, z)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert (grad[3] == 0).all()
    assert float(grad.abs().max()) < 10


def test_a_nan_is_not_hidden():
    z = projections(4, 8)
    z[2, 0] = math.nan
    result = distributed_nt_xent(z, 0.1)
    assert torch.isnan(result.loss)
    assert torch.isnan(result.global_loss)


@pytest.mark.parametrize("loss", [nt_xent, distributed_nt_xent])
class TestRefusals:
    @pytest.mark.parametrize("temperature", [0.0, -0.1, math.inf, math.nan])
    def test_temperature_out_of_range(self, loss, temperature):
        with pytest.raises(ConfigError, match=r"loss\.temperature"):
            loss(projections(4, 8), temperature)

    def test_odd_rows(self, loss):
        with pytest.raises(ConfigError, match="view pairs"):
            loss(projections(4, 8)[:-1], 0.1)

    @pytest.mark.parametrize("images", [0, 1])
    def test_no_negatives(self, loss, images):
        with pytest.raises(ConfigError, match=f"{images} images"):
            loss(projections(images, 8), 0.1)
