"""What ranks tell each other, as functions that autograd can walk through.

Every collective here works without a process group too, as the world of one rank, so that the code above has no
second path. The gradient convention is the one of distributed data parallel: the quantity being differentiated is
the *sum of all ranks' losses*, and each rank ends up with the derivative of that sum with respect to its own inputs.

`torch.distributed.nn` is not used: its gather is deprecated since torch 2.13 and does not compile. The widely copied
gather whose backward only hands back the rank's own slice is wrong: it drops what the other ranks' losses say about
this rank's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def world_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (None = all ranks); 1 without a process group."""
    return dist.get_world_size(group) if _is_initialized() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """This process's rank in `group` (None = all ranks); 0 without a process group."""
    return dist.get_rank(group) if _is_initialized() else 0


def all_gather_rows(x: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, list[int]]:
    """Stack the rows of all ranks in rank order; ranks may hold different numbers of rows, also none.

    The gradient of a row is the sum over ranks of what they computed for their copy of it.

    Args:
        x: This rank's rows, (m, ...). All other dimensions, the dtype and the device kind are the same on every rank.
        group: Ranks that take part; None = all.

    Returns:
        The rows of all ranks, (M, ...), and the number of rows of each rank, in rank order.
    """
    if world_size(group) == 1:
        return x, [len(x)]
    counts = _gather_counts(len(x), x.device, group)
    return cast(Tensor, _AllGatherRows.apply(x, counts, group)), counts


def all_reduce_sum(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum `x` (any shape, equal on all ranks) over the ranks; the gradient is summed over the ranks as well."""
    if world_size(group) == 1:
        return x
    return cast(Tensor, _AllReduceSum.apply(x, group))


def agree_any(flag: bool, group: ProcessGroup | None, device: torch.device) -> bool:
    """Whether `flag` is true on any rank: the same answer everywhere, so that no rank branches alone.

    Args:
        flag: What this rank sees.
        group: Ranks that take part; None = all.
        device: Where the group's backend wants its tensors (cpu for gloo, this rank's cuda device for nccl).
    """
    if world_size(group) == 1:
        return flag
    raised = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=group)
    return bool(raised.item())


class _AllGatherRows(torch.autograd.Function):
    """Backward is a reduce-scatter (sum) of the gradient of the stacked rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = counts, group
        # Collectives want equal shapes: pad to the longest share, cut the padding away after.
        mine = x.new_zeros((max(counts), *x.shape[1:]))
        mine[: len(x)] = x
        blocks = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(blocks, mine, group=group)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter_rows(grads[0], ctx.counts, ctx.group), None, None


class _AllReduceSum(torch.autograd.Function):
    """A sum is its own adjoint: every rank's loss depends on every rank's term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_reduced_copy(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduced_copy(grads[0], ctx.group), None


def _reduce_scatter_rows(grad: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Sum `grad` (M, ...) over the ranks and keep this rank's rows, (m, ...)."""
    own = rank(group)
    if dist.get_backend(group) == "nccl" and len(set(counts)) == 1:
        rows = grad.new_empty((counts[own], *grad.shape[1:]))
        dist.reduce_scatter_tensor(rows, grad.contiguous(), group=group)
        return rows
    # gloo has no reduce-scatter in the oldest torch we accept, and nccl's wants equal shares: sum all, keep ours.
    start = sum(counts[:own])
    return _all_reduced_copy(grad, group)[start : start + counts[own]]


def _gather_counts(count: int, device: torch.device, group: ProcessGroup | None) -> list[int]:
    mine = torch.tensor([count], device=device)
    counts = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(counts, mine, group=group)
    return cast(list[int], torch.cat(counts).tolist())


def _all_reduced_copy(x: Tensor, group: ProcessGroup | None) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
