"""The next batch is fetched while the step computes, each once and in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from simclr_ray.learn.nt_xent import distributed_nt_xent
from simclr_ray.learn.optim import make_optimizer
from simclr_ray.train import step as module
from simclr_ray.train.ahead import OneAhead
from simclr_ray.train.build import build_model
from simclr_ray.train.step import train_step
from tests.unit.train.test_step import CONFIG, images, views


def told(log: list[str]) -> Callable[[Any], Callable[[], Tensor]]:
    def bring(batch: Any) -> Callable[[], Tensor]:
        log.append(f"bring {batch}")

        def arrived() -> Tensor:
            log.append(f"use {batch}")
            return torch.zeros(1)

        return arrived

    return bring


@pytest.mark.parametrize("looks", [True, False])
def test_every_batch_comes_once_and_in_order(looks: bool) -> None:
    log: list[str] = []
    ahead = OneAhead(iter([0, 1, 2]), told(log))  # type: ignore[arg-type,list-item]
    for ready in ahead:
        ready.arrived()
        if looks:
            ahead.fetch()
            ahead.fetch()
        log.append(f"done {ready.batch}")
    in_time = ["bring 0", "use 0", "bring 1", "done 0", "use 1", "bring 2", "done 1", "use 2", "done 2"]
    late = ["bring 0", "use 0", "done 0", "bring 1", "use 1", "done 1", "bring 2", "use 2", "done 2"]
    assert log == (in_time if looks else late)


def test_a_step_fetches_between_its_backward_pass_and_its_first_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU would still be busy: gradients are asked for, and no number of the step has been looked at."""
    log: list[str] = []
    refuse = module.refuse_non_finite
    monkeypatch.setattr(module, "refuse_non_finite", lambda numbers: (log.append("wait"), refuse(numbers)))
    model = build_model(CONFIG).train()
    optimizer = make_optimizer("adamw", model, weight_decay=0.0)
    next(model.parameters()).register_post_accumulate_grad_hook(lambda _: log.append("backward"))
    train_step(
        model, optimizer, [views()], encode=lambda views: model(images(views)),
        loss_of=functools.partial(distributed_nt_xent, temperature=0.5), learning_rate=1e-3, clip_gradient_norm=None,
        meanwhile=lambda: log.append("fetch"),
    )  # fmt: skip
    assert log == ["backward", "fetch", "wait"]


def test_what_goes_wrong_ahead_is_raised_after_the_step_under_way() -> None:
    def batches() -> Iterator[int]:
        yield 0
        raise OSError("the store is gone")

    log: list[str] = []
    ahead = OneAhead(batches(), told(log))  # type: ignore[arg-type]
    steps = iter(ahead)
    next(steps)
    ahead.fetch()
    log.append("done 0")
    with pytest.raises(OSError, match="gone"):
        next(steps)
    assert log == ["bring 0", "done 0"]
