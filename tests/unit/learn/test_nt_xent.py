"""Laws of NT-Xent on one process. What ranks add is in test_distributed.py."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import simclr_ray
from simclr_ray.errors import ConfigError, NumericsError
from simclr_ray.learn import nt_xent as production
from simclr_ray.learn.loss_input import refuse_nonfinite
from simclr_ray.learn.nt_xent import distributed_nt_xent
from simclr_ray.learn.reference import nt_xent

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
    for tile in (None, 1, 2, 3):  # which divide the images, or do not
        loss, grad = gradient(lambda z, tile=tile: distributed_nt_xent(z, temperature, tile=tile).loss, z)
        torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-13)
        # The reference's own error: it gets at p - 1 by subtraction.
        torch.testing.assert_close(grad, reference_grad, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(distributed_nt_xent(z, temperature, tile=3).loss, loss)


@settings(deadline=None, max_examples=25)
@given(images_and_dim, st.floats(0.0005, 0.05), seeds)
def test_running_maxima_give_the_same_where_the_plain_sums_do_and_go_on_below(shape, temperature, seed):
    z = projections(*shape, seed)
    reference, reference_grad = gradient(lambda z: nt_xent(z, temperature), z)
    for tile in (None, 3):
        loss, grad = gradient(lambda z, tile=tile: distributed_nt_xent(z, temperature, tile=tile).loss, z)
        torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, reference_grad, rtol=1e-7, atol=1e-10 / temperature)


@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_plain_and_running_sums_have_the_same_statistics(temperature, monkeypatch):
    z = projections(9, 6)
    z[3], z[4] = 3 * z[0], 5 * z[1]
    plain = distributed_nt_xent(z, temperature, tile=4)
    monkeypatch.setattr("simclr_ray.learn.tiles.LARGEST_PLAIN_LOGIT", 0.0)
    running = distributed_nt_xent(z, temperature, tile=4)
    for name in production.NTXent._fields:
        torch.testing.assert_close(getattr(running, name), getattr(plain, name), rtol=1e-11, atol=1e-12)


def seen_apart(images: int) -> Tensor:
    """Within a view all alike, across views not at all: the two views' logits live on different scales."""
    z = projections(images, 8, dtype=torch.float64)
    z[:, 0] += torch.tensor([6.0, -6.0]).repeat_interleave(images)
    return z


@pytest.mark.parametrize("z", [projections(16, 8), seen_apart(16)], ids=["anywhere", "views apart"])
@pytest.mark.parametrize("temperature", [0.1, 0.0142, 0.01, 0.002, 0.0005])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entropy_is_right_at_small_temperatures(z, temperature, dtype):
    unit = torch.nn.functional.normalize(z.to(dtype).double())
    cosine = unit @ unit.T
    cross = torch.distributions.Categorical(logits=torch.cat([cosine[:16, 16:], cosine[16:, :16]]) / temperature)
    result = distributed_nt_xent(z.to(dtype), temperature, tile=5)
    error = 1e-9 if dtype == torch.float64 else 1e-5 / temperature
    assert float(result.entropy) == pytest.approx(float(cross.entropy().mean()), rel=error, abs=error * 0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_collapse_is_a_tie_and_no_hit(dtype):
    for seed in range(10):
        row = projections(1, 128, seed)[:1]
        assert float(distributed_nt_xent(row.repeat(64, 1).to(dtype), 0.1).accuracy) == 0.0


def test_statistics_keep_no_graph():
    result = distributed_nt_xent(projections(4, 3).requires_grad_(), 0.1)
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result[1:])


def test_auto_chooses_by_what_all_ranks_know():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    large, small = 5 << 30, 1 << 20
    assert production._way("auto", cpu, 1, large) == production._way("auto", gpu, 1, large) == "gather"
    assert production._way("auto", cpu, 2, large) == production._way("auto", gpu, 2, large) == "ring"
    assert production._way("auto", cpu, 2, 4 << 20) == "half"
    assert production._way("auto", cpu, 2, small) == production._way("auto", gpu, 2, 4 << 20) == "gather"
    assert production._way("half", gpu, 2, large) == "half"


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_the_host_never_waits_for_a_gpu(temperature):
    """A fake CUDA tensor has no values, so reading one raises."""
    with FakeTensorMode():
        z = torch.empty(40, 8, device="cuda")
        outputs = production._forward(z, temperature, None, [20], "auto", 8, 1.0, True, "torch", refuse=False)
    assert {output.device.type for output in outputs} == {"cuda"}


def test_flavour_paper_is_twice_the_loss_and_its_gradient():
    z = projections(5, 4)
    loss, grad = gradient(lambda z: distributed_nt_xent(z, 0.2).loss, z)
    doubled, doubled_grad = gradient(lambda z: distributed_nt_xent(z, 0.2, flavour="paper").loss, z)
    assert torch.equal(doubled, 2 * loss)
    torch.testing.assert_close(doubled_grad, 2 * grad)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_no_tensor_grows_with_the_square_of_the_batch(temperature):
    for images in (64, 256):
        z = projections(images, 8)
        with Largest() as largest:
            production._forward(z, temperature, None, None, "auto", 16, 1.0, True, "torch", refuse=False)
        assert largest.numel == 2 * images * 8  # rows x D; a tile is 256, the matrix 16 K and 262 K


def test_symmetry_saves_a_third_of_the_products():
    z = projections(256, 32)
    with FlopCounterMode(display=False) as counter:
        production._forward(z, 0.5, None, None, "auto", 32, 1.0, True, "torch", refuse=False)
    assert counter.get_total_flops() <= 4.2 * len(z) ** 2 * 32  # 6 by row against column
    with FlopCounterMode(display=False) as counter:
        production._forward(z, 0.5, None, None, "auto", 32, 1.0, False, "torch", refuse=False)
    assert counter.get_total_flops() <= 1.1 * len(z) ** 2 * 32  # no gradient is made that nobody wants


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
    loss, grad = gradient(lambda z: distributed_nt_xent(z, temperature).loss, z)
    scaled, scaled_grad = gradient(lambda z: distributed_nt_xent(z, temperature).loss, z * lengths)
    torch.testing.assert_close(scaled, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled_grad * lengths, grad, rtol=1e-8, atol=1e-11)


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
    for name in ("accuracy", "entropy", "positive_similarity", "negative_similarity"):
        assert not getattr(result, name).requires_grad
        assert getattr(result, name).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0142, 0.01, 0.001])
def test_small_temperatures_are_finite_and_right(dtype, temperature):
    apart = torch.eye(32, dtype=dtype)
    z = torch.cat([projections(16, 32, dtype=dtype), apart, -apart])  # positives that are opposite, too
    exact, exact_grad = gradient(lambda z: nt_xent(z, temperature), z.double())
    loss, grad = gradient(lambda z: distributed_nt_xent(z, temperature).loss, z)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)
    assert float((grad.double() - exact_grad).norm() / exact_grad.norm()) < (1e-3 if dtype == torch.float32 else 1e-2)


def test_scratch_is_no_larger_than_the_batch():
    with Largest() as largest:
        production._forward(projections(5, 8), 0.5, None, None, "auto", 4096, 1.0, True, "torch", refuse=False)
    assert largest.numel < 200


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e4, 1e15, 1e25, 1e37])
def test_lengths_that_bfloat16_can_hold_are_no_trouble(scale):
    z = (scale * projections(8, 16, dtype=torch.float32)).bfloat16()
    loss, grad = gradient(lambda z: distributed_nt_xent(z, 0.01).loss, z)
    exact, _ = gradient(lambda z: nt_xent(z, 0.01), z.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(grad).all()
    assert distributed_nt_xent(z, 0.01).nonfinite_rows.tolist() == [0]


PRECISIONS = """
import torch
from simclr_ray.learn.nt_xent import distributed_nt_xent


def gradient():
    z = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    distributed_nt_xent(z, 0.05).loss.backward()
    return z.grad


expected = gradient()
backends = torch.backends
for place, value in ((backends.cuda.matmul, "tf32"), (backends.mkldnn.matmul, "bf16"), (backends, "tf32")):
    if hasattr(place, "fp32_precision"):
        before = place.fp32_precision
        place.fp32_precision = value
        assert torch.equal(gradient(), expected), value
        assert place.fp32_precision == value, place.fp32_precision
        place.fp32_precision = before
"""


def test_newer_precision_switches_are_not_inherited_either():
    subprocess.run([sys.executable, "-c", PRECISIONS], check=True, timeout=120)


def test_reduced_matrix_precision_is_not_inherited():
    z = projections(64, 64, dtype=torch.float32)
    expected = gradient(lambda z: distributed_nt_xent(z, 0.05).loss, z)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bf16 products, on CPUs that have them
    try:
        actual = gradient(lambda z: distributed_nt_xent(z, 0.05).loss, z)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


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
    assert result.nonfinite_rows.tolist() == [1]
    with pytest.raises(NumericsError, match="1 non-finite projections on rank 0"):
        refuse_nonfinite(result.nonfinite_rows)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_infinities_are_not_hidden_either(temperature):
    z = projections(4, 8)
    z[5, 3] = math.inf
    z[6, 2] = -math.inf
    result = distributed_nt_xent(z, temperature)
    assert torch.isnan(result.loss)
    assert result.nonfinite_rows.tolist() == [2]


class TestRefusals:
    @pytest.mark.parametrize("temperature", [0.0, -0.1, math.inf, math.nan])
    def test_temperature_out_of_range(self, temperature):
        with pytest.raises(ConfigError, match=r"loss\.temperature"):
            distributed_nt_xent(projections(4, 8), temperature)

    @pytest.mark.parametrize("temperature", [torch.tensor(0.1), "0.1", True])
    def test_a_temperature_that_is_no_number(self, temperature):
        with pytest.raises(ConfigError, match="must be a Python number"):
            distributed_nt_xent(projections(4, 8), temperature)

    def test_a_temperature_whose_inverse_float32_cannot_hold(self):
        with pytest.raises(ConfigError, match="a finite number above 0"):
            distributed_nt_xent(projections(4, 8), 1e-45)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"flavour": "Paper"}, "unknown flavour.*standard or paper"),
            ({"exchange": "rings"}, "unknown exchange.*auto or gather or half or ring"),
            ({"kernel": "tritn"}, "unknown kernel.*torch or triton"),
            ({"tile": -3}, "tile=-3"),
            ({"images": [2, 2]}, "images announced do not fit the ranks.*1 numbers"),
            ({"group": -100}, "not a member of the group"),
        ],
    )
    def test_options_that_do_not_exist(self, options, words):
        with pytest.raises(ConfigError, match=words):
            distributed_nt_xent(projections(4, 8), 0.1, **options)

    def test_odd_rows(self):
        with pytest.raises(ConfigError, match="view pairs"):
            distributed_nt_xent(projections(4, 8)[:-1], 0.1)

    @pytest.mark.parametrize("images", [0, 1])
    def test_no_negatives(self, images):
        with pytest.raises(ConfigError, match=f"{images} images"):
            distributed_nt_xent(projections(images, 8), 0.1)

    @pytest.mark.parametrize("z", [torch.zeros(4), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2, 2)])
    def test_no_matrix_of_numbers(self, z):
        with pytest.raises(ConfigError, match="floating-point matrix"):
            distributed_nt_xent(z, 0.1)

    def test_other_rows_than_announced(self):
        with pytest.raises(ConfigError, match=r"8 rows on rank 0.*expected 6"):
            distributed_nt_xent(projections(4, 8), 0.1, images=[3])

    def test_a_triton_kernel_without_a_gpu(self):
        with pytest.raises(ConfigError, match=r"loss\.kernel.*(projections on cpu|not installed)"):
            distributed_nt_xent(projections(4, 8), 0.1, kernel="triton")

    def test_a_second_derivative(self):
        z = projections(4, 8).requires_grad_()
        (grad,) = torch.autograd.grad(distributed_nt_xent(z, 0.1).loss, z, create_graph=True)
        with pytest.raises(ConfigError, match="no second derivative"):
            grad.square().sum().backward()


class TestInAnyTorchProgram:
    def test_it_takes_the_views_apart_and_returns_the_loss(self):
        a, b = (view.requires_grad_() for view in projections(6, 5).chunk(2))
        loss = simclr_ray.nt_xent(a, b, 0.3)
        loss.backward()
        expected, grad = gradient(lambda z: nt_xent(z, 0.3), torch.cat([a, b]).detach())
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(torch.cat([a.grad, b.grad]), grad)

    def test_views_that_do_not_pair_up(self):
        z = projections(4, 8)
        for other in (z[:3], z[:4, :5], z[:4].float()):
            with pytest.raises(ConfigError, match="do not pair up"):
                simclr_ray.nt_xent(z[4:], other, 0.1)

    def test_projections_that_are_not_finite(self):
        z = projections(4, 8)
        z[2, 0] = math.nan
        with pytest.raises(NumericsError, match="on rank 0"):
            simclr_ray.nt_xent(*z.chunk(2), 0.1)

    def test_a_compiled_step_calls_it_without_a_graph_break(self):
        layer = torch.nn.Linear(8, 6).double()

        def inner(x: Tensor) -> Tensor:
            return production.distributed_nt_xent(layer(x), 0.2).loss

        def public(x: Tensor) -> Tensor:
            return production.nt_xent(*layer(x).chunk(2), 0.2)

        x = projections(5, 8)
        for step in (inner, public):
            expected = torch.autograd.grad(step(x), layer.weight)[0]
            compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(torch.autograd.grad(compiled(x), layer.weight)[0], expected)

    def test_it_needs_no_ray(self):
        code = (
            "import sys, torch, simclr_ray\n"
            "x = torch.eye(4, requires_grad=True)\n"
            "simclr_ray.nt_xent(x, x, 0.5).backward()\n"
            "assert not {'ray', 'timm', 'pyarrow'} & set(sys.modules), sorted(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
