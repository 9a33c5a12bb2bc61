"""Batch norm whose statistics are those of the global batch.

SimCLR (arXiv 2002.05709, section 2.2) takes mean and variance over all devices: statistics of a rank's own images
would let the encoder tell positives by the company they keep. torch's SyncBatchNorm does this on CUDA and refuses CPU
tensors; `GlobalBatchNorm` is the same layer for CPU ranks, so that what trains on a cluster is tested on a laptop.

Invariant: outputs, gradients and running statistics equal those of one BatchNorm over the rows of all ranks together,
also when ranks hold different numbers of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simclr_ray.collectives import all_reduce_sum, world_size


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over (n, C, ...) with the statistics of all ranks; parameters and state dict as torch's BatchNorm.

    Statistics are taken in float32 or wider, whatever the input's dtype. Evaluation mode and a world of one rank are
    torch's own BatchNorm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (n, C, ...) rows; n may differ by rank. Returns the input's shape, dtype and memory format.

        Raises:
            ValueError: The input has fewer than two dimensions.
        """
        self._check_input_dim(input)
        if not self.training or world_size() == 1:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input if input.dtype == torch.float64 else input.float()
            moments = _global_moments(x)
            self._update_running_statistics(moments)
            weight = self.weight if self.affine else x.new_ones(self.num_features)
            bias = self.bias if self.affine else x.new_zeros(self.num_features)
            out = cast(Tensor, _NormalizeByMoments.apply(x, weight, bias, moments, self.eps))
        return out.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"GlobalBatchNorm expects (n, C, ...) input, got {input.dim()} dimension(s)")

    @torch.no_grad()
    def _update_running_statistics(self, moments: _Moments) -> None:
        """As torch: the unbiased variance, and the plain average of all steps when momentum is None."""
        if not self.track_running_stats:  # also for a while, see `unrecorded`
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = moments.variance * (moments.num_values / (moments.num_values - 1))
        self.running_mean.lerp_(moments.mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def synchronise_batch_norm(module: nn.Module, *, device_type: Literal["cpu", "cuda"]) -> nn.Module:
    """Make every batch norm in `module` use the statistics of all ranks.

    Parameters and buffers are carried over as the same objects: an optimizer built before keeps working, the state
    dict does not change, and a beta that is not trained stays so.

    Args:
        module: Changed in place, unless it is a batch norm itself.
        device_type: Where it will run: torch's SyncBatchNorm on cuda, `GlobalBatchNorm` on cpu.

    Returns:
        The module to use from here on.
    """
    if device_type == "cuda":
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(module))  # type: ignore[no-untyped-call]
    if isinstance(module, _BatchNorm):
        return _as_global(module)
    for name, child in module.named_children():
        module.add_module(name, synchronise_batch_norm(child, device_type=device_type))
    return module


def _as_global(norm: _BatchNorm) -> GlobalBatchNorm:
    twin = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    twin.weight, twin.bias = norm.weight, norm.bias
    twin.running_mean, twin.running_var = norm.running_mean, norm.running_var
    twin.num_batches_tracked = norm.num_batches_tracked
    return twin.train(norm.training)


@contextlib.contextmanager
def unrecorded(module: nn.Module) -> Iterator[None]:
    """Within, batch norms in training mode take the batch's statistics as ever, but leave the running ones alone."""
    norms = [norm for norm in batch_norms(module) if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextlib.contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Within, running statistics become the plain average over the batches that pass in training mode.

    They start at mean 0 and variance 1, which say nothing of the images. Batch norms are left in evaluation mode.
    """
    norms = batch_norms(module)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: cumulative average
        norm.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every batch norm in `module`, of whatever kind."""
    return [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]


def keep_apart(module: nn.Module) -> None:
    """Give every batch norm the statistics of nobody, mean 0 and variance 1, and have it use them.

    Images then do not meet, so one that is not finite is the only one whose output is not. What was learned is lost.
    """
    for norm in batch_norms(module):
        norm.eval()
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.zero_()
            norm.running_var.fill_(1)


class _Moments(NamedTuple):
    """Per channel, over the rows of all ranks; the same on every rank."""

    num_values: Tensor  # 0-dim
    mean: Tensor  # (C,)
    variance: Tensor  # (C,), biased


@torch.no_grad()
def _global_moments(x: Tensor) -> _Moments:
    """Two small reductions: the mean first, then the squares *centred at it*.

    E[x^2] - E[x]^2, which one reduction would do for, cancels where the mean is large against the deviation.
    """
    local_count = x.numel() // x.shape[1]
    if local_count:
        # The fused kernel of torch's own BatchNorm; var_mean does the same at five times the time on CPU.
        local_mean, local_variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        local_mean, local_variance = x.new_zeros(2, x.shape[1])
    count_and_sum = all_reduce_sum(torch.cat([x.new_tensor([local_count]), local_count * local_mean]))
    num_values, mean = count_and_sum[0], count_and_sum[1:] / count_and_sum[0]
    squares = local_count * (local_variance + (local_mean - mean).square())  # about the global mean
    return _Moments(num_values, mean, all_reduce_sum(squares) / num_values)


class _NormalizeByMoments(torch.autograd.Function):
    """(x - mean) / std * weight + bias, where mean and std depend on the x of all ranks.

    With xhat the normalized x, N the number of values a channel and sums over the rows of all ranks::

        dx = weight / std * (dy - sum(dy) / N - xhat * sum(dy * xhat) / N)

    Written out, because autograd through the two reductions makes a step of the small encoder half as long again.
    Gradients of weight and bias stay this rank's share, as for any parameter: data parallel sums them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, moments: _Moments, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, *moments)
        ctx.eps = eps
        return F.batch_norm(x, moments.mean, moments.variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight, num_values, mean, variance = ctx.saved_tensors
        dy, inverse_std = grads[0], torch.rsqrt(variance + ctx.eps)
        if x.numel():
            _, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
                dy, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
            )
        else:  # torch 2.14 dies of a division by zero there
            weight_grad, bias_grad = torch.zeros_like(mean), torch.zeros_like(mean)
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, bias_grad, None, None
        sums = all_reduce_sum(torch.stack([bias_grad, weight_grad])) / num_values
        # dx as dy * a + x * b + c with a, b and c per channel: two passes over the rows.
        a = weight * inverse_std
        b = -a * sums[1] * inverse_std
        c = -a * sums[0] - b * mean
        dx = torch.addcmul(_per_channel(c, x), x, _per_channel(b, x)).addcmul_(dy, _per_channel(a, x))
        return dx, weight_grad, bias_grad, None, None


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` (C,) shaped to broadcast against `x` (n, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
