"""Gradient-cached micro-batches: a global batch whose activations do not fit, with the loss over all of it.

Splitting a contrastive batch and adding up gradients changes the loss: each piece has fewer negatives. Here the
encoder runs twice over every micro-batch. The first pass keeps projections only; the loss over the whole global batch
gives their gradients; the second pass encodes again, with activations, and carries each piece's gradient back
(GradCache, arXiv 2101.06983). Cost: one more forward pass. Memory: the activations of one micro-batch.

What batch norm does: its statistics are those of a micro-batch, in both passes the same. The gradient is exactly that
of the network so defined, which without batch norm, or with frozen statistics, is the full batch's. Running statistics
move once for each micro-batch, in the second pass. Random numbers drawn in the network (dropout) are replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_ray.learn.nt_xent import NTXent
from simclr_ray.model.batch_norm import unrecorded

Piece = TypeVar("Piece")


def backward_in_micro_batches(
    model: nn.Module,
    pieces: Sequence[Piece],
    *,
    encode: Callable[[Piece], Tensor],
    loss_of: Callable[[Tensor], NTXent],
) -> NTXent:
    """Loss of a whole batch and its gradients in the parameters, holding the activations of one piece at a time.

    One piece alone is encoded once, the ordinary way. DistributedDataParallel synchronises gradients once, with the
    last piece, so every rank needs the same number of pieces; their sizes may differ.

    Args:
        model: What `encode` calls; gradients are added to its parameters'.
        pieces: Micro-batches, each what `encode` takes.
        encode: Projections of a piece, (2 n_k, D), ordered [views a; views b]. Called twice for each of several
            pieces, so it must do the same both times.
        loss_of: Loss of the projections of all pieces, (2n, D), ordered [views a; views b].

    Returns:
        What `loss_of` returned; its backward has run.
    """
    if len(pieces) == 1:
        result = loss_of(encode(pieces[0]))
        result.loss.backward()  # type: ignore[no-untyped-call]
        return result
    device = next(model.parameters()).device
    states, parts = [], []
    with torch.no_grad(), unrecorded(model):
        for piece in pieces:
            states.append(_random_state(device))
            parts.append(_by_view(encode(piece)))
    sizes = [part.shape[1] for part in parts]
    z = torch.cat(parts, dim=1).flatten(0, 1).requires_grad_()
    del parts
    result = loss_of(z)
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    gradients = torch.split(_by_view(z.grad), sizes, dim=1)
    for index, (piece, state, gradient) in enumerate(zip(pieces, states, gradients, strict=True)):
        with _synchronised(model, last=index == len(pieces) - 1):
            _set_random_state(state, device)
            torch.autograd.backward(encode(piece), gradient.flatten(0, 1))
    return result


def _by_view(z: Tensor) -> Tensor:
    """(2n, D) to (2, n, D)."""
    return z.reshape(2, len(z) // 2, z.shape[1])


def _synchronised(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """Ranks add up their gradients with the last piece; before it DistributedDataParallel keeps to itself."""
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if last or not isinstance(inner, DistributedDataParallel):
        return contextlib.nullcontext()
    return inner.no_sync()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
