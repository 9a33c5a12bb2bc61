"""Laws over real gloo ranks: any number of ranks, any split of the images, is one process with the whole batch.

One spawn a world size: `all_cases` computes everything on the ranks, the tests look at what came back.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import simclr_ray
from simclr_ray.collectives import (
    agree_any,
    all_gather_rows,
    all_reduce_sum,
    rank,
    reduce_scatter_rows_,
    ring,
    world_size,
)
from simclr_ray.errors import ConfigError, NumericsError
from simclr_ray.learn import nt_xent as production
from simclr_ray.learn.exchange import Half
from simclr_ray.learn.micro_batch import backward_in_micro_batches
from simclr_ray.learn.nt_xent import distributed_nt_xent
from simclr_ray.learn.reference import nt_xent
from simclr_ray.model.batch_norm import synchronise_batch_norm
from simclr_ray.model.projector import make_projector
from simclr_ray.model.simclr import SimCLR
from tests.unit.learn.ranks import run_ranks

pytestmark = pytest.mark.integration

TEMPERATURE = 0.2
EXCHANGES = ("gather", "half", "ring")
SHARES = {
    1: [[6]],
    2: [[3, 3], [4, 2], [1, 5], [6, 0]],
    3: [[2, 2, 2], [3, 1, 2], [1, 0, 5]],
    4: [[1, 2, 2, 1], [0, 3, 0, 3]],
}
KINDS = [
    (torch.float64, 0.2),
    (torch.float64, 0.005),
    (torch.float32, 0.1),
    (torch.float32, 0.005),
    (torch.bfloat16, 0.1),
]
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


def train_step(shares: list[int], exchange: str, announced: bool) -> dict[str, Any]:
    model = synchronise_batch_norm(tiny_model(), device_type="cpu")
    parallel = DistributedDataParallel(model)  # must outlive backward: its reducer dies with it, without a word
    images = share_of(whole_batch(), shares).requires_grad_()
    result = distributed_nt_xent(
        parallel(images), TEMPERATURE, exchange=exchange, images=shares if announced else None, tile=2
    )
    result.loss.backward()
    statistics = {name: getattr(result, name).detach() for name in result._fields}
    return {"state": state_after_step(model), "image_grad": images.grad, **statistics}


def projections_and_gradients(shares: list[int], dtype: torch.dtype, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Loss, and gradient of this rank's projections scaled as the mean over ranks sees it; for every exchange."""
    out = []
    for exchange in EXCHANGES:
        mine = whole_projections().to(dtype).split(shares, dim=1)[rank()].flatten(0, 1).requires_grad_()
        result = distributed_nt_xent(mine, temperature, exchange=exchange, tile=2)
        result.loss.backward()
        out.append((result.loss.detach(), mine.grad / world_size(), [float(value) for value in result[1:5]]))
    return out


def in_a_group_of_the_last_ranks() -> list[tuple[Tensor, Tensor]] | str:
    """All but rank 0, and one of them without images and without a wish for a gradient: it helps all the same."""
    ranks = list(range(1, world_size()))
    group = dist.new_group(ranks)
    if rank() == 0:
        return refusal(torch.randn(4, 4), group=group)
    shares = [6, *[0] * (len(ranks) - 1)]
    out = []
    for exchange in EXCHANGES:
        mine = whole_projections().split(shares, dim=1)[rank() - 1].flatten(0, 1)
        mine.requires_grad_(len(mine) > 0)
        result = distributed_nt_xent(mine, TEMPERATURE, group, exchange=exchange, tile=2)
        if len(mine):
            result.loss.backward()
        out.append((result.loss.detach(), mine.grad if len(mine) else mine))
    return out


def whole_projections(images: int = 6) -> Tensor:
    """(2, B, D)"""
    return torch.randn(2, images, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def micro_batched_step(sizes: list[list[int]]) -> dict[str, Any]:
    """A step whose rank r encodes pieces of `sizes[r]` images; batch norm frozen at the initial statistics."""
    model = tiny_model().eval()
    parallel = DistributedDataParallel(model)
    reductions = []

    def count(group: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reductions.append(bucket.index())
        return allreduce_hook(group, bucket)

    parallel.register_comm_hook(None, count)
    shares = [sum(pieces) for pieces in sizes]
    mine = whole_batch(sum(shares)).split(shares, dim=1)[rank()]
    result = backward_in_micro_batches(
        parallel,
        mine.split(sizes[rank()], dim=1),
        encode=lambda views: parallel(views.flatten(0, 1)),
        loss_of=lambda z: distributed_nt_xent(z, TEMPERATURE),
    )
    return {"state": state_after_step(model), "loss": result.loss.detach(), "reductions": len(reductions)}


class Collectives(TorchDispatchMode):
    """Counts what goes to torch.distributed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def collectives_of_each_pass(shares: list[int]) -> list[tuple[int, int]]:
    out = []
    for exchange in EXCHANGES:
        mine = whole_projections().split(shares, dim=1)[rank()].flatten(0, 1).requires_grad_()
        with Collectives() as forward:  # the custom op is opaque to the mode, what is inside it is not
            production._forward(mine.detach(), TEMPERATURE, None, shares, exchange, 2, 1.0, True, "torch", refuse=False)
        result = distributed_nt_xent(mine, TEMPERATURE, exchange=exchange, images=shares)
        with Collectives() as backward:
            result.loss.backward()
        out.append((forward.count, backward.count))
    return out


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


def rows_around(shares: list[int]) -> dict[str, Any]:
    """What the collectives bring to each rank of rows 0 to 5."""
    x = torch.arange(6.0).split(shares)[rank()].unsqueeze(1)
    scattered = torch.arange(6.0).unsqueeze(1) * (rank() + 1)
    reduce_scatter_rows_(scattered, shares)
    return {
        "gathered": all_gather_rows(x, shares),
        "ring": [(owner, block.clone()) for owner, block in ring(x, shares)],
        "scattered": scattered.split(shares)[rank()],
    }


def odd_rows(rows: int) -> str:
    try:
        distributed_nt_xent(torch.randn(rows, 4), TEMPERATURE)
    except ConfigError as error:
        return str(error)
    return "accepted"


def refusal(z: Tensor, temperature: float = TEMPERATURE, **options: Any) -> str:
    try:
        simclr_ray.nt_xent(*z.tensor_split(2), temperature, **options)
    except (ConfigError, NumericsError) as error:
        return str(error)
    return "accepted"


def all_cases() -> dict[str, Any]:
    all_shares = SHARES[world_size()]
    everyone, last = world_size(), rank() == world_size() - 1
    nan_here = torch.full((4, 3), float("nan")) if last else torch.randn(4, 3)
    return {
        "train": [
            [train_step(shares, exchange, announced=case % 2 == 1) for exchange in EXCHANGES]
            for case, shares in enumerate(all_shares)
        ],
        "projections": {
            (case, dtype, temperature): projections_and_gradients(shares, dtype, temperature)
            for case, shares in enumerate(all_shares)
            for dtype, temperature in KINDS
        },
        "micro-batches": micro_batched_step([[2, 1, 1], [1, 1, 2], [3, 2, 2], [1, 1, 1]][:everyone]),
        "collectives": collectives_of_each_pass(all_shares[0]),
        "norm": [normalize(rows_for_norm(), shares, fresh_norm().double()) for shares in all_shares],
        "norm float32": normalize(rows_for_norm(torch.float32), all_shares[-1], fresh_norm()),
        "norm bfloat16": normalize((rows_for_norm() - 1000).bfloat16(), all_shares[0], fresh_norm()),
        "norm cumulative": normalize(rows_for_norm(), all_shares[0], fresh_norm(momentum=None).double()),
        "channels last": synchronise_batch_norm(fresh_norm(), device_type="cpu")(
            rows_for_norm(torch.float32).contiguous(memory_format=torch.channels_last)
        ).is_contiguous(memory_format=torch.channels_last),
        "rows": [rows_around(shares) for shares in all_shares],
        "place": (rank(), everyone),
        "agree": [agree_any(flag, None, torch.device("cpu")) for flag in (False, last, True)],
        "odd rows": odd_rows(3 if last else 4),
        "one image": refusal(torch.randn(2 if last else 0, 4)),
        "dimensions": refusal(torch.randn(4, 3 if last else 4)),
        "dtypes": refusal(torch.randn(4, 4, dtype=torch.bfloat16 if last else torch.float32)),
        "exchanges": refusal(torch.randn(4, 4), exchange="ring" if last else "half"),
        "flavours": refusal(torch.randn(4, 4), flavour="paper" if last else "standard"),
        "group": in_a_group_of_the_last_ranks() if everyone > 1 else None,
        "temperatures": refusal(torch.randn(4, 4), 0.3 if last else 0.2),
        "nan": distributed_nt_xent(nan_here, TEMPERATURE).loss,
        "nan rows": distributed_nt_xent(nan_here, TEMPERATURE).nonfinite_rows,
        "nan refused": refusal(nan_here),
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
    for by_rank in zip(*outcomes, strict=True):  # the same exchange on all ranks
        for outcome in by_rank:
            close(outcome["loss"], loss.detach())
            assert outcome["state"].keys() == expected.keys()
            for name, tensor in expected.items():
                # Gradients of weights in front of a batch norm are differences: absolute error on the scale of 1e-2.
                close(outcome["state"][name], tensor, atol=1e-12)
        shares = [outcome["image_grad"].unflatten(0, (2, -1)) for outcome in by_rank if len(outcome["image_grad"])]
        close(torch.cat(shares, dim=1).flatten(0, 1) / ranks, images.grad, atol=1e-12)


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_statistics_are_global_and_the_same_on_all_ranks(results, ranks, case):
    expected = distributed_nt_xent(tiny_model()(whole_batch().flatten(0, 1)), TEMPERATURE)
    for name in ("loss", "accuracy", "entropy", "positive_similarity", "negative_similarity"):
        for exchange in range(len(EXCHANGES)):
            values = [result["train"][case][exchange][name] for result in results[ranks]]
            assert all(torch.equal(value, values[0]) for value in values), name
            close(values[0], getattr(expected, name).detach(), atol=1e-12)


@pytest.mark.parametrize(("dtype", "temperature"), KINDS)
@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_gradients_of_projections_are_those_of_one_process(results, ranks, case, dtype, temperature):
    whole = whole_projections().to(dtype).double().flatten(0, 1).requires_grad_()
    loss = nt_xent(whole, temperature)
    loss.backward()
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]  # bf16: one rounding of the result
    if temperature < 0.1 and dtype == torch.float32:
        bound = 1e-4  # logits of up to 200 carry float32's rounding
    for outcomes in zip(*(result["projections"][case, dtype, temperature] for result in results[ranks]), strict=True):
        assert all(torch.equal(value, outcomes[0][0]) for value, _, _ in outcomes)
        assert all(statistics == outcomes[0][2] for _, _, statistics in outcomes)
        alone = distributed_nt_xent(whole_projections().to(dtype).flatten(0, 1), temperature)
        assert outcomes[0][2] == pytest.approx([float(value) for value in alone[1:5]], rel=max(bound, 1e-6), abs=1e-6)
        assert relative_error(outcomes[0][0], loss.detach()) < max(bound, 1e-6 if dtype != torch.float64 else 0)
        grad = torch.cat([grad.view(2, len(grad) // 2, 5) for _, grad, _ in outcomes], dim=1).flatten(0, 1)
        assert grad.dtype == dtype
        assert relative_error(grad, whole.grad) < bound


@pytest.mark.parametrize("ranks", [ranks for ranks in SHARES if ranks > 1])
def test_a_group_of_some_ranks_is_a_world_of_its_own(results, ranks):
    outsider, *members = (result["group"] for result in results[ranks])
    assert "not a member of the group" in outsider
    whole = whole_projections().flatten(0, 1).requires_grad_()
    loss = nt_xent(whole, TEMPERATURE)
    loss.backward()
    for exchange in range(len(EXCHANGES)):
        for place, member in enumerate(members):
            close(member[exchange][0], loss.detach())
            if place == 0:  # the rank that has all the images
                close(member[exchange][1] / (ranks - 1), whole.grad, atol=1e-12)


class OneOfMany(Half):
    """A rank's part of the half plan, without the ranks."""

    def __init__(self, own: int, counts: list[int]) -> None:
        self._counts, self._rank = counts, own
        self._columns = torch.zeros(2, sum(counts), 1)
        self._mine = slice(sum(counts[:own]), sum(counts[: own + 1]))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_half_takes_every_pair_of_ranks_once(counts):
    images, owner = sum(counts), [r for r, count in enumerate(counts) for _ in range(count)]
    taken = torch.zeros(2, images, 2, images, dtype=torch.int64)
    for own in range(len(counts)):
        part = OneOfMany(own, counts)
        for block in part.blocks():
            for row_view, column_view in block.quadrants:
                taken[row_view, part._mine, column_view, block.images] += 1
    both_ways = taken + taken.permute(2, 3, 0, 1)
    apart = torch.tensor(owner)[:, None] != torch.tensor(owner)[None, :]
    assert torch.equal(both_ways, apart.long()[None, :, None, :].expand(2, images, 2, images))


@pytest.mark.parametrize("ranks", SHARES)
def test_backward_of_the_loss_runs_no_collective(results, ranks):
    for result in results[ranks]:
        for forward, backward in result["collectives"]:
            assert backward == 0
            assert (forward > 0) == (ranks > 1)


@pytest.mark.parametrize("ranks", SHARES)
def test_micro_batches_on_ranks_are_the_whole_batch_and_one_reduction(results, ranks):
    sizes = [[2, 1, 1], [1, 1, 2], [3, 2, 2], [1, 1, 1]][:ranks]
    model = tiny_model().eval()
    loss = nt_xent(model(whole_batch(sum(map(sum, sizes))).flatten(0, 1)), TEMPERATURE)
    loss.backward()
    expected = state_after_step(model)
    for result in results[ranks]:
        outcome = result["micro-batches"]
        close(outcome["loss"], loss.detach())
        for name, tensor in expected.items():
            close(outcome["state"][name], tensor, atol=1e-12)
        assert outcome["reductions"] == 1  # the model is one bucket


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
def test_rows_come_around(results, ranks, case):
    shares = SHARES[ranks][case]
    blocks = torch.arange(6.0).unsqueeze(1).split(shares)
    for place, result in enumerate(results[ranks]):
        rows = result["rows"][case]
        assert torch.equal(rows["gathered"], torch.arange(6.0).unsqueeze(1))
        assert [owner for owner, _ in rows["ring"]] == [(place - step) % ranks for step in range(1, ranks)]
        assert all(torch.equal(block, blocks[owner]) for owner, block in rows["ring"])
        assert torch.equal(rows["scattered"], blocks[place] * sum(range(1, ranks + 1)))


@pytest.mark.parametrize("ranks", SHARES)
def test_ranks_answer_alike(results, ranks):
    for place, result in enumerate(results[ranks]):
        assert result["place"] == (place, ranks)
        assert result["agree"] == [False, True, True]
        assert "view pairs" in result["odd rows"]
        assert "at least 2 images" in result["one image"]
        assert torch.isnan(result["nan"])
        assert result["nan rows"].tolist() == [0] * (ranks - 1) + [4]
        assert f"4 non-finite projections on rank {ranks - 1}" in result["nan refused"]
        for what in ("dimensions", "dtypes", "temperatures", "exchanges", "flavours"):
            assert ("accepted" if ranks == 1 else f"different {what}") in result[what]
        assert result["channels last"]


def test_without_a_process_group_the_world_is_one_rank():
    x = torch.ones(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert torch.equal(all_gather_rows(x, [3]), x)
    reduce_scatter_rows_(x.detach(), [3])
    assert torch.equal(x, torch.ones(3, 2))
    assert list(ring(x, [3])) == []
    assert all_reduce_sum(x) is x
    assert agree_any(True, None, torch.device("cpu"))
    assert not agree_any(False, None, torch.device("cpu"))
