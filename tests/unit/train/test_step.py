"""A step learns, counts its numbers, clips, and refuses what is not finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
import torch

from simclr_ray.configure import load_config
from simclr_ray.errors import NumericsError
from simclr_ray.learn.nt_xent import distributed_nt_xent
from simclr_ray.learn.optim import make_optimizer
from simclr_ray.learn.reference import nt_xent
from simclr_ray.train.build import build_model
from simclr_ray.train.step import STEP_METRICS, StepNumbers, train_step

CONFIG = load_config({"model": {"encoder": "small", "projection_dim": 16, "zero_init_last": False}})


def views() -> torch.Tensor:
    return torch.rand(16, 2, 16, 16, 3, generator=torch.Generator().manual_seed(0))


def images(views: torch.Tensor) -> torch.Tensor:
    return views.transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2)


def step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Sequence[torch.Tensor], **changes: float
) -> StepNumbers:
    return train_step(
        model,
        optimizer,
        micro_batches,
        encode=lambda views: model(images(views)),
        loss_of=functools.partial(distributed_nt_xent, temperature=0.5),
        **({"learning_rate": 1e-3, "clip_gradient_norm": None} | changes),  # type: ignore[arg-type]
    )


def run(
    steps: int, *, name: str = "adamw", rate: float = 1e-3, clip: float | None = None, pieces: int = 1
) -> tuple[list[torch.Tensor], torch.nn.Module]:
    model = build_model(CONFIG).train()
    optimizer = make_optimizer(name, model, weight_decay=0.0)  # type: ignore[arg-type]
    numbers = [
        step(model, optimizer, views().chunk(pieces), learning_rate=rate, clip_gradient_norm=clip).values
        for _ in range(steps)
    ]
    return numbers, model


@pytest.mark.parametrize(("name", "rate", "pieces"), [("adamw", 1e-3, 1), ("lars", 1.0, 1), ("adamw", 1e-3, 4)])
def test_repeating_a_batch_learns_it(name: str, rate: float, pieces: int) -> None:
    numbers, _ = run(25, name=name, rate=rate, pieces=pieces)
    loss, accuracy = STEP_METRICS.index("train/loss"), STEP_METRICS.index("train/contrastive_accuracy")
    assert numbers[-1][loss] < numbers[0][loss] - 0.5
    assert numbers[-1][accuracy] > 0.9 > numbers[0][accuracy]


def test_the_first_loss_is_the_reference_of_the_initial_model() -> None:
    (numbers, *_), _ = run(1)
    expected = nt_xent(build_model(CONFIG).train()(images(views())), 0.5)
    assert numbers[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_clipping_bounds_the_update_and_reports_the_norm_before_it() -> None:
    start = build_model(CONFIG).state_dict()
    (free, *_), _ = run(1, name="lars", rate=1.0)
    (clipped, *_), model = run(1, name="lars", rate=1.0, clip=1e-9)
    norm = STEP_METRICS.index("train/grad_norm")
    assert clipped[norm] == free[norm] > 1e-3
    plain = "encoder.bn1.weight"  # not adapted by LARS, so its update is the clipped gradient
    assert (model.state_dict()[plain] - start[plain]).abs().max() <= 2e-9


def test_a_number_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = build_model(CONFIG).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer("adamw", model, weight_decay=0.0)
    bad = views()
    bad[0] = math.nan
    with pytest.raises(NumericsError, match=r"train/loss = nan.*32 non-finite projections on rank 0"):
        step(model, optimizer, [bad], learning_rate=1.0)  # batch norm carries the NaN to all images
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_the_initial_weights_are_the_seed_s_alone() -> None:
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = build_model(CONFIG).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(12)
    second = build_model(CONFIG).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(load_config(CONFIG, ["run.seed=1"])).state_dict()
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])
