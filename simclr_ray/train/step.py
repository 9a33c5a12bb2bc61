"""One optimizer step, as the paper has it: both views through encoder and projector at once, NT-Xent, LARS."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from simclr_ray.errors import NumericsError
from simclr_ray.learn.loss_input import describe_nonfinite
from simclr_ray.learn.micro_batch import backward_in_micro_batches
from simclr_ray.learn.nt_xent import NTXent
from simclr_ray.learn.optim import gradient_norm, set_learning_rate
from simclr_ray.views.apply import normalise
from simclr_ray.views.policy import Policy

#: Order of the numbers that a step reports, all global means; names of `observe.metrics`.
STEP_METRICS = (
    "train/loss",
    "train/contrastive_accuracy",
    "train/contrastive_entropy",
    "train/positive_similarity",
    "train/negative_similarity",
    "train/grad_norm",
)


#: Reason in the quarantine for images whose projections were not finite.
NON_FINITE = "not_finite"


class NonFiniteStepError(NumericsError):
    """A step that must not be taken."""

    def __init__(self, step: int, error: NumericsError, sample_ids: Sequence[int]) -> None:
        """Of a step (counted from 0), with the images whose projections were not finite, if any."""
        self.step, self.sample_ids = step, tuple(sample_ids)
        more = f" and {len(sample_ids) - 8} more" if len(sample_ids) > 8 else ""
        shown = ", ".join(map(str, sample_ids[:8])) + more
        of = f"; images with such projections: sample ids {shown}" if sample_ids else ""
        super().__init__(
            error.what, where=f"step {step}", got=f"{error.got}{of}", expected=error.expected, fix=error.fix
        )
        self._error = error

    def __reduce__(self) -> tuple[object, ...]:
        """By what it was made of."""
        return (NonFiniteStepError, (self.step, self._error, self.sample_ids))


class StepNumbers(NamedTuple):
    """What a step says of itself, on its device, the same on all ranks."""

    values: Tensor
    """(6,) float32, in the order of `STEP_METRICS`."""
    nonfinite_rows: Tensor
    """(W,) projections of each rank that are not finite."""


def encoder_input(views: Tensor, policy: Policy, *, channels_last: bool) -> Tensor:
    """Views (n, 2, S, S, 3) uint8 as the encoder reads them: (2n, 3, S, S), ordered [views a; views b]."""
    images = normalise(views.transpose(0, 1).flatten(0, 1), policy)
    return images if channels_last else images.contiguous()


def autocast_of(
    precision: Literal["fp32", "bf16"] | None, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    """The context that encoder and projector run in; None takes bf16 on GPUs and fp32 on CPUs."""
    if (precision or ("bf16" if device.type == "cuda" else "fp32")) == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Tensor],
    *,
    encode: Callable[[Tensor], Tensor],
    loss_of: Callable[[Tensor], NTXent],
    learning_rate: float,
    clip_gradient_norm: float | None,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepNumbers:
    """Do one step and return its numbers.

    Args:
        model: SimCLR under DistributedDataParallel.
        optimizer: Over the model's parameters.
        micro_batches: This rank's views, each (n_k, 2, S, S, 3), as `encode` takes them; usually one.
        encode: Views to projections (2 n_k, D), ordered [views a; views b], through `model`.
        loss_of: NT-Xent of the projections (2n, D) of all micro-batches.
        learning_rate: Of this step.
        clip_gradient_norm: Largest gradient norm, or None.
        meanwhile: Called once the backward pass has been handed to the device, before anything waits for it.

    Raises:
        NumericsError: a number is not finite, and the weights are as they were; on every rank alike, for all the
            numbers are global. Looking at them makes the host wait for a GPU once a step, as mixed precision with loss
            scaling does too: a step that must not be taken can be found in no other way.
    """
    set_learning_rate(optimizer, learning_rate)
    optimizer.zero_grad(set_to_none=True)
    result = backward_in_micro_batches(model, micro_batches, encode=encode, loss_of=loss_of)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = gradient_norm(parameters)
    if clip_gradient_norm is not None:
        _clip(parameters, norm, clip_gradient_norm)
    means = (
        result.loss.detach(),
        result.accuracy,
        result.entropy,
        result.positive_similarity,
        result.negative_similarity,
        norm,
    )
    numbers = StepNumbers(torch.stack([value.float() for value in means]), result.nonfinite_rows)
    meanwhile()
    refuse_non_finite(numbers)
    optimizer.step()
    return numbers


def refuse_non_finite(numbers: StepNumbers) -> None:
    """Stop before a NaN reaches a checkpoint.

    Raises:
        NumericsError: naming the numbers that are not finite, and the ranks whose projections were not.
    """
    if bool(torch.isfinite(numbers.values).all()):
        return
    values = zip(STEP_METRICS, numbers.values.tolist(), strict=True)
    got = [f"{name} = {value}" for name, value in values if not math.isfinite(value)]
    raise NumericsError(
        "training has diverged",
        got=", ".join([*got, *describe_nonfinite(numbers.nonfinite_rows)]),
        fix="lower optim.base_learning_rate or raise loss.temperature; the newest checkpoint is from before",
    )


def _clip(parameters: Sequence[Tensor], norm: Tensor, largest: float) -> None:
    """Scale gradients so that their norm is at most `largest`; no host sync."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
