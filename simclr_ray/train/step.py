"""One optimizer step, as the paper has it: both views through encoder and projector at once, NT-Xent, LARS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from simclr_ray.errors import NumericsError
from simclr_ray.learn.nt_xent import distributed_nt_xent
from simclr_ray.learn.optim import gradient_norm, set_learning_rate

#: Order of the numbers that a step reports, all global means; names of `observe.metrics`.
STEP_METRICS = (
    "train/loss",
    "train/contrastive_accuracy",
    "train/contrastive_entropy",
    "train/positive_similarity",
    "train/negative_similarity",
    "train/grad_norm",
)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    *,
    temperature: float,
    learning_rate: float,
    clip_gradient_norm: float | None,
    autocast: Callable[[], AbstractContextManager[object]],
    check_finite: bool,
) -> Tensor:
    """Do one step and return its numbers.

    Args:
        model: SimCLR under DistributedDataParallel; maps (2n, 3, S, S) to projections (2n, D).
        optimizer: Over the model's parameters.
        images: This rank's (2n, 3, S, S), ordered [views a; views b].
        temperature: Of NT-Xent.
        learning_rate: Of this step.
        clip_gradient_norm: Largest gradient norm, or None.
        autocast: Makes the context for encoder and projector.
        check_finite: Look at the numbers before the weights change. Costs a host sync, which only GPUs feel.

    Returns:
        (6,) float32 on the device, in the order of `STEP_METRICS`.

    Raises:
        NumericsError: a number is not finite; on every rank alike, for all the numbers are global.
    """
    set_learning_rate(optimizer, learning_rate)
    optimizer.zero_grad(set_to_none=True)
    with autocast():
        projections = model(images)  # (2n, D)
    result = distributed_nt_xent(projections, temperature)
    result.loss.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = gradient_norm(parameters)
    if clip_gradient_norm is not None:
        _clip(parameters, norm, clip_gradient_norm)
    numbers = torch.stack(
        [
            value.float()
            for value in (
                result.global_loss,
                result.accuracy,
                result.entropy,
                result.positive_similarity,
                result.negative_similarity,
                norm,
            )
        ]
    )
    if check_finite:
        refuse_non_finite(numbers)
    optimizer.step()
    return numbers


def refuse_non_finite(numbers: Tensor) -> None:
    """Stop before a NaN reaches a checkpoint.

    Raises:
        NumericsError: naming the numbers that are not finite.
    """
    if bool(torch.isfinite(numbers).all()):
        return
    values = dict(zip(STEP_METRICS, numbers.tolist(), strict=True))
    raise NumericsError(
        "training has diverged",
        got=", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)),
        fix="lower optim.base_learning_rate or raise loss.temperature; the newest checkpoint is from before",
    )


def _clip(parameters: Sequence[Tensor], norm: Tensor, largest: float) -> None:
    """Scale gradients so that their norm is at most `largest`; no host sync."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
