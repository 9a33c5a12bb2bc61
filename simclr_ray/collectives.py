"""What ranks tell each other.

Every collective here works without a process group too, as the world of one rank, so that the code above has no
second path. Only `all_reduce_sum` is walked through by autograd (batch norm needs it); its gradient convention is the
one of distributed data parallel: the quantity being differentiated is the *sum of all ranks' losses*. The loss needs
no differentiable gather, because it brings its own gradient: see `learn.nt_xent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.14 renamed these and warns about the old names, which are the only ones before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (None = all ranks); 1 without a process group."""
    return dist.get_world_size(group) if _is_initialized() else 1


def rank(group: ProcessGroup | None = None) -> int:
    """This process's rank in `group` (None = all ranks); 0 without a process group."""
    return dist.get_rank(group) if _is_initialized() else 0


def group_name(group: ProcessGroup | None) -> str:
    """A text that stands for `group` where only plain values may pass; "" for all ranks."""
    return "" if group is None else str(group.group_name)


def group_of(name: str) -> ProcessGroup | None:
    """The inverse of `group_name`."""
    # What functional collectives do; torch has no public way back from a name.
    return cast(ProcessGroup, cast(Any, dist.distributed_c10d)._resolve_process_group(name)) if name else None


def all_gather_equal(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Stack `x` of all ranks, (W, ...); shape and dtype are the same on every rank."""
    ranks = world_size(group)
    if ranks == 1:
        return x.unsqueeze(0)
    stacked = x.new_empty((ranks, *x.shape))
    _all_gather_single(stacked.view(-1), x.reshape(-1), group=group)
    return stacked


def all_gather_rows(
    x: Tensor, counts: Sequence[int], group: ProcessGroup | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Stack the rows of all ranks in rank order.

    Args:
        x: This rank's rows, (m, ...). All other dimensions and the dtype are the same on every rank.
        counts: Rows of every rank, in rank order; the same on every rank. Zero is allowed.
        group: Ranks that take part; None = all.
        out: Contiguous (sum of counts, ...) to write to, where the caller has one.

    Returns:
        (sum of counts, ...).
    """
    if out is None:
        out = x.new_empty((sum(counts), *x.shape[1:]))
    longest = max(counts)
    if len(counts) == 1:
        out.copy_(x)
    elif min(counts) == longest:
        _all_gather_single(out.view(-1), x.reshape(-1), group=group)
    else:  # collectives want equal shapes: pad to the longest share, cut the padding away after
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = x
        blocks = all_gather_equal(padded, group)
        torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)], out=out)
    return out


def reduce_scatter_rows_(x: Tensor, counts: Sequence[int], group: ProcessGroup | None = None) -> None:
    """Sum this rank's rows of `x` over the ranks, in place; what becomes of the other rows is undefined.

    Args:
        x: Contiguous (sum of counts, ...), the same shape on every rank; rank r's rows come after those of lower ranks.
        counts: Rows of every rank. Zero is allowed.
        group: Ranks that take part; None = all.
    """
    if len(counts) == 1:
        return
    if dist.get_backend(group) == "nccl" and len(set(counts)) == 1:
        own = x[rank(group) * counts[0] : (rank(group) + 1) * counts[0]]
        # NCCL does this in place where the output is the rank's own part of the input.
        _reduce_scatter_single(own.view(-1), x.view(-1), group=group)
    else:  # nccl's wants equal shares; gloo's is missing in the oldest torch we accept
        dist.all_reduce(x, group=group)


def all_reduce_max_(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Elementwise maximum over the ranks, in place."""
    if world_size(group) > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x


def ring(block: Tensor, counts: Sequence[int], group: ProcessGroup | None = None) -> Iterator[tuple[int, Tensor]]:
    """The blocks of all other ranks, one after the other, each from the rank before; never more than three held.

    The next block travels while the caller works on the one it got. A block is valid until the next is asked for.
    Every rank must exhaust the iterator.

    Args:
        block: This rank's, with `counts[rank]` rows on dimension 0; all other dimensions are equal on all ranks.
        counts: Rows of every rank's block. Zero is allowed.
        group: Ranks that take part; None = all.

    Yields:
        The rank that a block belongs to, and the block.
    """
    ranks, own = len(counts), rank(group)
    if ranks == 1:
        return
    longest = max(counts)
    buffers = [block.new_empty((longest, *block.shape[1:])) for _ in range(min(2, ranks - 1))]
    current, wait = block, _pass_on(block, buffers[0][: counts[own - 1]], group)
    for step in range(1, ranks):
        wait()
        owner = (own - step) % ranks
        current = buffers[(step - 1) % 2][: counts[owner]]
        if step < ranks - 1:
            wait = _pass_on(current, buffers[step % 2][: counts[owner - 1]], group)
        yield owner, current


def _pass_on(send: Tensor, receive: Tensor, group: ProcessGroup | None) -> Callable[[], None]:
    """Start sending to the next rank and receiving from the one before; call the result to wait for both."""
    ranks, own = world_size(group), rank(group)
    peers = [(own + 1) % ranks, (own - 1) % ranks]
    if group is not None:
        peers = [dist.get_global_rank(group, peer) for peer in peers]
    transfers = [
        dist.P2POp(kind, tensor, peer, group=group)
        for kind, tensor, peer in ((dist.isend, send, peers[0]), (dist.irecv, receive, peers[1]))
        if tensor.numel()
    ]
    works = dist.batch_isend_irecv(transfers) if transfers else []

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


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


class _AllReduceSum(torch.autograd.Function):
    """A sum is its own adjoint: every rank's loss depends on every rank's term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_reduced_copy(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduced_copy(grads[0], ctx.group), None


def _all_reduced_copy(x: Tensor, group: ProcessGroup | None) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
