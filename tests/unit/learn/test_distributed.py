"""Laws over real gloo ranks: any number of ranks, any split of the images, is one process with the whole batch.

One spawn a world size: `all_cases` computes everything on the ranks, the tests look at what came back.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_ray.collectives import agree_any, all_gather_rows, all_reduce_sum, rank, world_size
from simclr_ray.errors import ConfigError
from simclr_ray.learn.nt_xent import distributed_nt_xent, nt_xent
from simclr_ray.model.batch_norm import synchronise_batch_norm
from simclr_ray.model.projector import make_projector
from simclr_ray.model.simclr import SimCLR
from tests.unit.learn.ranks import run_ranks

pytestmark = pytest.mark.integration

TEMPERATURE = 0.2
SHARES = {
    1: [[6]],
    2: [[3, 3], [4, 2], [1, 5], [6, 0]],
    3: [[2, 2, 2], [3, 1, 2], [1, 0, 5]],
}
CASES = [
    pytest.param(ranks, case, id=str(shares))
    for ranks, all_shares in SHARES.items()
    for case, shares in enumerate(all_shares)
]


def tiny_model() -> SimCLR:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    return SimCLR(encoder, make_projector(5, layers=2, output_dim=4)).double()


def whole_batch(images: int = 6) -> Tensor:
    """Views (2, B, 3, 7, 7), far from zero mean."""
    generator = torch.Generator().manual_seed(1)
    return 3.0 + torch.randn(2, images, 3, 7, 7, generator=generator, dtype=torch.float64)


def share_of(views: Tensor, shares: list[int]) -> Tensor:
    """This rank's [views a; views b]."""
    return views.split(shares, dim=1)[rank()].flatten(0, 1)


def state_after_step(model: nn.Module) -> dict[str, Tensor]:
    grads = {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | {name: b.clone() for name, b in model.named_buffers()}


def train_step(shares: list[int]) -> dict[str, Any]:
    model = synchronise_batch_norm(tiny_model(), device_type="cpu")
    parallel = DistributedDataParallel(model)  # must outlive backward: its reducer dies with it, without a word
    images = share_of(whole_batch(), shares).requires_grad_()
    result = distributed_nt_xent(parallel(images), TEMPERATURE)
    result.loss.backward()
    statistics = {name: getattr(result, name).detach() for name in result.__slots__}
    return {"state": state_after_step(model), "image_grad": images.grad, **statistics}


def normalize(x: Tensor, shares: list[int], norm: nn.Module) -> dict[str, Tensor]:
    """One batch norm layer alone: rows in `x` split by `shares`, the loss a fixed weighting of the outputs."""
    norm = synchronise_batch_norm(norm, device_type="cpu")
    mine = x.split(shares)[rank()].clone().requires_grad_()
    out = norm(mine)
    (out.double() * weighting(x).split(shares)[rank()]).sum().backward()
    grads = {name: all_reduce_sum(p.grad) for name, p in norm.named_parameters()}
    return {"out": out.detach(), "grad": mine.grad, **grads, **{name: b.clone() for name, b in norm.named_buffers()}}


def weighting(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).sin().view_as(x)


def rows_for_norm(dtype: torch.dtype = torch.float64) -> Tensor:
    x = 1000.0 + torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.to(dtype)


def fresh_norm(momentum: float | None = 0.1) -> nn.BatchNorm2d:
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(4, momentum=momentum)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def gather_and_weigh(shares: list[int]) -> dict[str, Any]:
    """Rank r's loss weighs gathered row k by (r + 1) * k."""
    x = torch.arange(6.0).split(shares)[rank()].unsqueeze(1).requires_grad_()
    rows, counts = all_gather_rows(x)
    (rows[:, 0] * torch.arange(6.0) * (rank() + 1)).sum().backward()
    return {"rows": rows.detach(), "counts": counts, "grad": x.grad}


def refusal(rows: int) -> str:
    try:
        distributed_nt_xent(torch.randn(rows, 4), TEMPERATURE)
    except ConfigError as error:
        return str(error)
    return "accepted"


def all_cases() -> dict[str, Any]:
    all_shares = SHARES[world_size()]
    everyone, last = world_size(), rank() == world_size() - 1
    nan_here = torch.full((4, 3), float("nan")) if last else torch.randn(4, 3)
    return {
        "train": [train_step(shares) for shares in all_shares],
        "norm": [normalize(rows_for_norm(), shares, fresh_norm().double()) for shares in all_shares],
        "norm float32": normalize(rows_for_norm(torch.float32), all_shares[-1], fresh_norm()),
        "norm bfloat16": normalize((rows_for_norm() - 1000).bfloat16(), all_shares[0], fresh_norm()),
        "norm cumulative": normalize(rows_for_norm(), all_shares[0], fresh_norm(momentum=None).double()),
        "channels last": synchronise_batch_norm(fresh_norm(), device_type="cpu")(
            rows_for_norm(torch.float32).contiguous(memory_format=torch.channels_last)
        ).is_contiguous(memory_format=torch.channels_last),
        "gather": [gather_and_weigh(shares) for shares in all_shares],
        "place": (rank(), everyone),
        "agree": [agree_any(flag, None, torch.device("cpu")) for flag in (False, last, True)],
        "odd rows": refusal(3 if last else 4),
        "one image": refusal(2 if last else 0),
        "nan": distributed_nt_xent(nan_here, TEMPERATURE).global_loss,
    }


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    """What each rank computed, by world size."""
    return {ranks: run_ranks(all_cases, ranks) for ranks in SHARES}


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_one_training_step_is_the_step_of_one_process(results, ranks, case):
    model, images = tiny_model(), whole_batch().flatten(0, 1).requires_grad_()
    loss = nt_xent(model(images), TEMPERATURE)
    loss.backward()
    expected = state_after_step(model)
    outcomes = [result["train"][case] for result in results[ranks]]
    for outcome in outcomes:
        close(outcome["global_loss"], loss.detach())
        assert outcome["state"].keys() == expected.keys()
        for name, tensor in expected.items():
            # Gradients of weights in front of a batch norm are differences: absolute error on the scale of 1e-2.
            close(outcome["state"][name], tensor, atol=1e-12)
    close(torch.stack([outcome["loss"] for outcome in outcomes]).mean(), loss.detach())
    shares = [outcome["image_grad"].unflatten(0, (2, -1)) for outcome in outcomes if len(outcome["image_grad"])]
    close(torch.cat(shares, dim=1).flatten(0, 1) / ranks, images.grad, atol=1e-12)


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_statistics_are_global_and_the_same_on_all_ranks(results, ranks, case):
    expected = distributed_nt_xent(tiny_model()(whole_batch().flatten(0, 1)), TEMPERATURE)
    for name in ("global_loss", "accuracy", "entropy", "positive_similarity", "negative_similarity"):
        values = [result["train"][case][name] for result in results[ranks]]
        assert all(torch.equal(value, values[0]) for value in values), name
        close(values[0], getattr(expected, name), atol=1e-12)


def plain_norm(x: Tensor, norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    (out.double() * weighting(x)).sum().backward()
    grads = {name: p.grad for name, p in norm.named_parameters()}
    return {"out": out.detach(), "grad": x.grad, **grads, **{name: b.clone() for name, b in norm.named_buffers()}}


def joined(outcomes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all ranks together; what is no row must be the same on all ranks."""
    for outcome in outcomes:
        assert all(torch.equal(outcome[k], outcomes[0][k]) for k in outcome if k not in ("out", "grad"))
    return outcomes[0] | {k: torch.cat([outcome[k] for outcome in outcomes]) for k in ("out", "grad")}


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_global_batch_norm_is_batch_norm_of_all_rows(results, ranks, case):
    actual = joined([result["norm"][case] for result in results[ranks]])
    expected = plain_norm(rows_for_norm(), fresh_norm().double())
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], atol=1e-10)


@pytest.mark.parametrize("ranks", SHARES)
def test_global_batch_norm_averages_plainly_without_momentum(results, ranks):
    actual = joined([result["norm cumulative"] for result in results[ranks]])
    expected = plain_norm(rows_for_norm(), fresh_norm(momentum=None).double())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        close(actual[name], expected[name])


@pytest.mark.parametrize("ranks", SHARES)
def test_global_batch_norm_keeps_its_precision_far_from_zero_mean(results, ranks):
    # Mean 1000, deviation 1: E[x^2] - E[x]^2 in float32 would leave a relative error of about 1e-1.
    actual = joined([result["norm float32"] for result in results[ranks]])
    expected = plain_norm(rows_for_norm(torch.float32).double(), fresh_norm().double())
    assert relative_error(actual["out"], expected["out"]) < 1e-4
    assert relative_error(actual["running_var"], expected["running_var"]) < 1e-5


@pytest.mark.parametrize("ranks", SHARES)
def test_global_batch_norm_takes_statistics_of_bfloat16_in_float32(results, ranks):
    actual = joined([result["norm bfloat16"] for result in results[ranks]])
    expected = plain_norm((rows_for_norm() - 1000).bfloat16().double(), fresh_norm().double())
    assert actual["out"].dtype == actual["grad"].dtype == torch.bfloat16
    assert actual["running_mean"].dtype == torch.float32
    assert relative_error(actual["running_var"], expected["running_var"]) < 1e-6
    assert relative_error(actual["out"], expected["out"]) < 4e-3  # one bfloat16 rounding
    assert relative_error(actual["grad"], expected["grad"]) < 1e-2


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_gathered_rows_come_in_rank_order_and_collect_the_gradients_of_all_ranks(results, ranks, case):
    outcomes = [result["gather"][case] for result in results[ranks]]
    for outcome in outcomes:
        assert torch.equal(outcome["rows"][:, 0], torch.arange(6.0))
        assert outcome["counts"] == SHARES[ranks][case]
    grad = torch.cat([outcome["grad"] for outcome in outcomes])[:, 0]
    assert torch.equal(grad, torch.arange(6.0) * sum(range(1, ranks + 1)))


@pytest.mark.parametrize("ranks", SHARES)
def test_ranks_answer_alike(results, ranks):
    for place, result in enumerate(results[ranks]):
        assert result["place"] == (place, ranks)
        assert result["agree"] == [False, True, True]
        assert "view pairs" in result["odd rows"]
        assert "at least 2 images" in result["one image"]
        assert torch.isnan(result["nan"])
        assert result["channels last"]


def test_without_a_process_group_the_world_is_one_rank():
    x = torch.ones(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert all_gather_rows(x) == (x, [3])
    assert all_reduce_sum(x) is x
    assert agree_any(True, None, torch.device("cpu"))
    assert not agree_any(False, None, torch.device("cpu"))
