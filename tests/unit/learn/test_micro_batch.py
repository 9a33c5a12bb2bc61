"""Laws of gradient-cached micro-batches on one process; what ranks add is in test_distributed.py."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simclr_ray.learn.micro_batch import backward_in_micro_batches
from simclr_ray.learn.nt_xent import distributed_nt_xent
from simclr_ray.model.batch_norm import batch_norms, calibrating

TEMPERATURE = 0.2


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    between = {"plain": nn.Identity(), "norm": nn.BatchNorm1d(8), "dropout": nn.Dropout(0.5)}[kind]
    return nn.Sequential(nn.Linear(6, 8), between, nn.ReLU(), nn.Linear(8, 4)).double()


def views(images: int) -> Tensor:
    return torch.randn(2, images, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(z: Tensor):
    return distributed_nt_xent(z, TEMPERATURE)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def cached(model: nn.Module, sizes: list[int]) -> Tensor:
    pieces = views(sum(sizes)).split(sizes, dim=1)
    return backward_in_micro_batches(
        model, pieces, encode=lambda piece: model(piece.flatten(0, 1)), loss_of=loss_of
    ).loss.detach()


def in_one_graph(model: nn.Module, sizes: list[int]) -> Tensor:
    """The twin: all micro-batches one after the other, activations and all, then one backward."""
    parts = [model(piece.flatten(0, 1)).unflatten(0, (2, -1)) for piece in views(sum(sizes)).split(sizes, dim=1)]
    loss = loss_of(torch.cat(parts, dim=1).flatten(0, 1)).loss
    loss.backward()
    return loss.detach()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(gradients(one), gradients(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    for (name, a), (_, b) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1))
def test_without_batch_norm_the_gradient_is_the_whole_batch_s(sizes):
    split, whole = network("plain"), network("plain")
    torch.testing.assert_close(cached(split, sizes), in_one_graph(whole, [sum(sizes)]), rtol=1e-12, atol=1e-13)
    assert_same(split, whole)


def test_with_frozen_statistics_too():
    split, whole = network("norm").eval(), network("norm").eval()
    torch.testing.assert_close(cached(split, [3, 2, 4]), in_one_graph(whole, [9]), rtol=1e-12, atol=1e-13)
    assert_same(split, whole)
    assert int(batch_norms(split)[0].num_batches_tracked) == 0


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", [[9], [3, 2, 4]])
def test_batch_norm_is_that_of_the_micro_batches_and_is_recorded_once(sizes, momentum):
    split = network("norm").train()
    batch_norms(split)[0].momentum = momentum
    whole = copy.deepcopy(split)
    torch.testing.assert_close(cached(split, sizes), in_one_graph(whole, sizes), rtol=1e-12, atol=1e-13)
    assert_same(split, whole)
    assert int(batch_norms(split)[0].num_batches_tracked) == len(sizes)
    if len(sizes) > 1:  # and so it is another network than with the whole batch's statistics
        other = network("norm").train()
        in_one_graph(other, [9])
        assert (gradients(split)[0] - gradients(other)[0]).norm() > 0.05 * gradients(other)[0].norm()


def test_random_numbers_are_the_same_in_both_passes():
    split, whole = network("dropout").train(), network("dropout").train()
    torch.manual_seed(5)
    loss = cached(split, [3, 2, 4])
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.testing.assert_close(loss, in_one_graph(whole, [3, 2, 4]), rtol=1e-12, atol=1e-13)
    assert_same(split, whole)
    assert torch.equal(torch.rand(1), after)  # as if each number had been drawn once


def test_gradients_are_added_to_those_that_are_there():
    model = network("plain")
    cached(model, [2, 2])
    first = [grad.clone() for grad in gradients(model)]
    cached(model, [2, 2])
    for once, twice in zip(first, gradients(model), strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_calibration_leaves_the_mean_of_the_batches_statistics_and_freezes_them():
    model = network("norm").train()
    norm = batch_norms(model)[0]
    model(views(3).flatten(0, 1))  # whatever was there before is forgotten
    batches = [views(5).flatten(0, 1), 2 + views(7).flatten(0, 1)]
    with calibrating(model):
        for batch in batches:
            model(batch)
    inputs = [model[0](batch).detach() for batch in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(dim=0) for x in inputs]).mean(dim=0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(dim=0) for x in inputs]).mean(dim=0))
    assert (norm.momentum, norm.training, model.training) == (0.1, False, True)
