"""LARS against a naive twin, groups, schedules; every constant of SimCLR's optimiser with its source."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from simclr_ray.learn.optim import (
    LARS,
    gradient_norm,
    learning_rate_at,
    make_optimizer,
    parameter_groups,
    peak_learning_rate,
    set_learning_rate,
)
from simclr_ray.model.batch_norm import synchronise_batch_norm
from simclr_ray.model.projector import make_projector


class NaiveLARS:
    """google-research/simclr, tf2/lars_optimizer.py with classic_momentum, one number-list a parameter."""

    def __init__(self, params, decays, adapts, momentum=0.9, eta=0.001):
        self.w = [p.detach().flatten().tolist() for p in params]
        self.v = [[0.0] * len(w) for w in self.w]
        self.decays, self.adapts, self.momentum, self.eta = decays, adapts, momentum, eta

    def step(self, grads, lr):
        for k, grad in enumerate(grads):
            g = [x + self.decays[k] * w for x, w in zip(grad.flatten().tolist(), self.w[k], strict=True)]
            trust = 1.0
            if self.adapts[k] and math.hypot(*self.w[k]) > 0 and math.hypot(*g) > 0:
                trust = self.eta * math.hypot(*self.w[k]) / math.hypot(*g)
            self.v[k] = [self.momentum * v + lr * trust * x for v, x in zip(self.v[k], g, strict=True)]
            self.w[k] = [w - v for w, v in zip(self.w[k], self.v[k], strict=True)]


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), make_projector(5, layers=2)
    )
    nn.init.zeros_(network[3].weight)  # a weight matrix that starts at zero must still learn
    return network.double()


def test_lars_follows_its_naive_twin_while_the_learning_rate_changes():
    network = small_network()
    optimizer = make_optimizer("lars", network, weight_decay=0.01)
    adapted, plain = ([*group["params"]] for group in optimizer.param_groups)
    params = adapted + plain
    decays, adapts = [0.01] * len(adapted) + [0.0] * len(plain), [True] * len(adapted) + [False] * len(plain)
    twin = NaiveLARS(params, decays, adapts)
    for step in range(6):
        lr = learning_rate_at(step, peak=4.8, warmup_steps=2, total_steps=6, schedule="cosine")
        set_learning_rate(optimizer, lr)
        for k, p in enumerate(params):
            # No gradient at all at first for one, and a zero one: the trust ratio must not divide by it.
            p.grad = torch.zeros_like(p) if (k, step) == (0, 1) else torch.randn_like(p)
        optimizer.step()
        twin.step([p.grad for p in params], lr)
        for p, w in zip(params, twin.w, strict=True):
            torch.testing.assert_close(p.detach().flatten(), torch.tensor(w, dtype=p.dtype), rtol=1e-12, atol=1e-12)
    assert network[3].weight.abs().min() > 0


def test_lars_keeps_the_learning_rate_inside_the_momentum():
    # lr 1 then 0: classic momentum still moves by 0.9 * v, the popular kind would stand still.
    w = nn.Parameter(torch.zeros(1))
    optimizer = LARS([w], lr=1.0, adapt=False)
    w.grad = torch.ones(1)
    optimizer.step()
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert w.item() == pytest.approx(-1.9)


def test_lars_passes_parameters_without_gradient_by_and_runs_a_closure():
    w, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = LARS([w, frozen], lr=0.1)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(frozen, torch.ones(2))
    assert not torch.equal(w, torch.ones(2))


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_an_optimizer_resumes_from_its_state_dict(name):
    def steps(optimizer, network, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            set_learning_rate(optimizer, 0.1 * (step + 1))
            for p in network.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()

    whole, halved = small_network(), small_network()
    steps(make_optimizer(name, whole, weight_decay=1e-4), whole, 0, 4)
    before = make_optimizer(name, halved, weight_decay=1e-4)
    steps(before, halved, 0, 2)
    after = make_optimizer(name, halved, weight_decay=1e-4)
    after.load_state_dict(before.state_dict())
    steps(after, halved, 2, 4)
    for p, q in zip(whole.parameters(), halved.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("convert", [lambda m: m, lambda m: synchronise_batch_norm(m, device_type="cpu")])
def test_batch_norm_and_biases_are_neither_decayed_nor_adapted(convert):
    network = convert(small_network())
    names = {id(p): name for name, p in network.named_parameters()}
    adapted, plain = parameter_groups(network, weight_decay=1e-6)
    assert (adapted["weight_decay"], adapted["adapt"]) == (1e-6, True)
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)
    assert {names[id(p)] for p in adapted["params"]} == {"0.weight", "3.weight", "4.0.weight", "4.3.weight"}
    expected = {"0.bias", "1.weight", "1.bias", "3.bias", "4.1.weight", "4.1.bias", "4.4.weight"}  # no 4.4.bias: fixed
    assert {names[id(p)] for p in plain["params"]} == expected


def test_optimizers_are_built_with_the_papers_constants_and_rate_zero():
    lars = make_optimizer("lars", small_network(), weight_decay=1e-6)
    assert isinstance(lars, LARS)
    for group in lars.param_groups:
        assert group["eta"] == 0.001  # google-research/simclr, tf2/lars_optimizer.py: EETA_DEFAULT
        assert group["momentum"] == 0.9  # google-research/simclr, tf2/run.py: flag momentum
        assert group["lr"] == 0.0
    adamw = make_optimizer("adamw", small_network(), weight_decay=0.05, momentum=0.8)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.05, 0.0]
    assert all(group["betas"] == (0.8, 0.999) for group in adamw.param_groups)


def test_peak_learning_rates_of_the_paper():
    # SimCLR, section 2.2: 4.8 = 0.3 * 4096 / 256. Appendix B.1: 0.075 * sqrt(B), equal at 4096.
    assert peak_learning_rate("linear", 0.3, 4096) == pytest.approx(4.8)
    assert peak_learning_rate("sqrt", 0.075, 4096) == pytest.approx(4.8)
    # SimCLR v2, section 3: 0.1 * sqrt(B), 6.4 at 4096.
    assert peak_learning_rate("sqrt", 0.1, 4096) == pytest.approx(6.4)
    assert peak_learning_rate("constant", 2e-3, 4096) == 2e-3


@st.composite
def spans(draw):
    warmup = draw(st.integers(0, 200))
    return warmup, draw(st.integers(max(1, warmup), 2000))


@given(spans(), st.floats(1e-6, 10), st.sampled_from(["cosine", "constant"]))
def test_the_rate_rises_to_its_peak_and_never_after(span, peak, schedule):
    warmup, total = span
    rates = [
        learning_rate_at(step, peak=peak, warmup_steps=warmup, total_steps=total, schedule=schedule)
        for step in range(total + 1)
    ]
    assert all(0 <= rate <= peak for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup] == peak
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[0] == 0.0  # google-research/simclr, tf2/model.py: step / warmup_steps * peak, step from 0
    if warmup < total:
        assert rates[-1] == pytest.approx(0.0 if schedule == "cosine" else peak, abs=1e-12)


def test_the_cosine_counts_from_the_end_of_warm_up():
    # google-research/simclr, tf2/model.py, WarmUpAndCosineDecay: CosineDecay(peak, total - warmup), at step - warmup.
    def rate(step: int) -> float:
        return learning_rate_at(step, peak=2.0, warmup_steps=10, total_steps=110, schedule="cosine")

    assert rate(5) == 1.0
    assert rate(60) == pytest.approx(1.0)
    assert rate(35) == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert rate(1000) == 0.0


def test_gradient_norm_is_that_of_all_gradients_together():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 1)), nn.Parameter(torch.zeros(1))]
    assert gradient_norm(params).item() == 0.0
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([[0.0], [4.0], [12.0]])
    assert gradient_norm(params).item() == pytest.approx(13.0)
