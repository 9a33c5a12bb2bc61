"""Optimizers and learning rates of SimCLR: LARS, which parameters it adapts, and the schedule as plain arithmetic.

The learning rate is no business of the optimizer here: it is a pure function of the step, written into the optimizer
before each step, so that a resumed run has nothing to restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

OptimizerName = Literal["lars", "adamw"]
RateRule = Literal["linear", "sqrt", "constant"]
Schedule = Literal["cosine", "constant"]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with SGD momentum, as google-research/simclr (tf2/lars_optimizer.py) has it.

    For a parameter w with gradient g, in a group with `adapt`::

        d = g + weight_decay * w
        trust = eta * |w| / |d|         if both norms are above 0, else 1
        v = momentum * v + lr * trust * d
        w = w - v

    In a group without `adapt`, trust is 1. The momentum is the classic one, learning rate *inside* the buffer: ports
    that multiply by it afterwards differ whenever the learning rate changes, that is always in SimCLR.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        adapt: bool = True,
    ) -> None:
        """Values given here are defaults that a parameter group may override.

        Args:
            params: Parameters, or groups of them (see `parameter_groups`).
            lr: Learning rate; usually left to `set_learning_rate`.
            momentum: Decay of the update's running sum.
            weight_decay: Factor of w in the gradient.
            eta: Trust coefficient.
            adapt: Whether updates are scaled by the trust ratio.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; returns what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(params, group)
        return loss

    def _step_group(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        directions = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(directions, _trust_ratios(params, directions, group["eta"]))
        buffers = [self._momentum_buffer(p) for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, directions, alpha=group["lr"])
        torch._foreach_sub_(params, buffers)

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _trust_ratios(params: list[Tensor], directions: tuple[Tensor, ...] | list[Tensor], eta: float) -> list[Tensor]:
    """One 0-dim tensor a parameter, never read by the host. 1 where a norm is 0: zero weights must be able to move."""
    weight_norms = torch.stack(torch._foreach_norm(params))
    update_norms = torch.stack(torch._foreach_norm(directions))
    both = (weight_norms > 0) & (update_norms > 0)
    return list(torch.where(both, eta * weight_norms / update_norms, 1.0).unbind())


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into those with weight decay and trust ratio, and those with neither.

    Neither: gamma and beta of every batch norm, found by module type, and every bias, found by name
    (google-research/simclr, tf2/model.py, build_optimizer). Not by number of dimensions: that would catch any vector.

    Returns:
        Always two groups, the adapted one first; keys `params`, `weight_decay` and `adapt`.
    """
    of_batch_norm = {id(p) for m in module.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    adapted: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, param in module.named_parameters():
        if param.requires_grad:
            is_plain = id(param) in of_batch_norm or name.rpartition(".")[2] == "bias"
            (plain if is_plain else adapted).append(param)
    return [
        {"params": adapted, "weight_decay": weight_decay, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False},
    ]


def make_optimizer(
    name: OptimizerName, module: nn.Module, *, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """Build an optimizer over `parameter_groups(module)`, with learning rate 0 until `set_learning_rate` is called.

    Args:
        name: "lars", SimCLR's, for large global batches; "adamw" for small ones.
        module: Whose trainable parameters to update.
        weight_decay: On weights only, not on batch norm and biases.
        momentum: LARS's momentum; AdamW's beta1.
    """
    groups = parameter_groups(module, weight_decay)
    if name == "lars":
        return LARS(groups, momentum=momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=(momentum, 0.999))


def peak_learning_rate(rule: RateRule, base: float, global_batch: int) -> float:
    """Learning rate at the end of warm-up, from the global batch of B images (SimCLR, appendix B.1).

    Args:
        rule: "linear": base * B / 256. "sqrt": base * sqrt(B). "constant": base.
        base: 0.3 (linear) and 0.075 (sqrt) in the paper; they meet at B = 4096, at 4.8.
        global_batch: Images per optimizer step over all ranks.
    """
    assert global_batch > 0
    match rule:
        case "linear":
            return base * global_batch / 256
        case "sqrt":
            return base * math.sqrt(global_batch)
        case "constant":
            return base


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: Schedule) -> float:
    """Learning rate of optimizer step `step`, counted from 0 (google-research/simclr, WarmUpAndCosineDecay).

    Rises linearly over `warmup_steps`, so that the very first step has rate 0 and step `warmup_steps` has `peak`; then
    falls as half a cosine that would reach 0 at `total_steps`, without restarts, or stays at `peak`.
    """
    assert step >= 0
    assert 0 <= warmup_steps <= total_steps
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in all parameter groups from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(params: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, 0-dim, on their device and not read by the host; 0 without any."""
    grads = [p.grad for p in params if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) if grads else torch.zeros(())
