"""NT-Xent, the SimCLR loss, exact for any global batch: no similarity matrix is ever stored.

SimCLR (arXiv 2002.05709), Eq. 1 and Algorithm 1. For a global batch of B images there are M = 2B anchors; an anchor's
positive is the other view of its image, its negatives are the other 2B - 2 projections. With unit rows z,
s_ij = z_i . z_j / temperature and neg_i the sum of exp(s_ij) over the negatives::

    x_i = log neg_i - s_i,positive        loss = 1/M sum_i log(1 + exp(x_i))        q_i = sigmoid(x_i)
    w_i = 1 / (neg_i + exp(s_i,positive))
    dloss/dz_i = 1/(M temperature) [ sum_{negatives j} exp(s_ij) (w_i + w_j) z_j - (q_i + q_positive) z_positive ]

which is cross entropy over the 2B - 1 others, with the positive kept out of the sum: once positives win, cross
entropy is the difference of two nearly equal numbers, and its float32 gradient is rounding noise at small
temperatures. Because s is symmetric, a rank that knows all z and all w has its whole gradient: the forward pass sweeps
over the tiles twice (sums, then gradient) and keeps one tensor of the size of its own projections, the columns are
freed before the encoder's backward, and **backward is one multiplication without any collective**.

Invariant: whatever the number of ranks, however unevenly the images lie on them and whichever way they exchange
projections, the mean over ranks of the parameter gradients (what DistributedDataParallel computes) is the gradient of
the reference (`learn.reference`) on the whole batch, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from simclr_ray.collectives import group_name, group_of, rank, world_size
from simclr_ray.errors import ConfigError
from simclr_ray.learn.anchors import compute_dtype, facts_of, finish_gradient, global_numbers, normalize, own_numbers
from simclr_ray.learn.exchange import ExchangeName, gather_facts, make_exchange
from simclr_ray.learn.kernels import KernelName, make_kernel
from simclr_ray.learn.loss_input import (
    Told,
    check_choice,
    check_images,
    check_matrix,
    check_member,
    check_temperature,
    describe,
    images_by_rank,
    refuse_nonfinite,
)
from simclr_ray.precision import full_precision_products

Flavour = Literal["standard", "paper"]
"""`standard`: the mean of Algorithm 1. `paper`: twice that, as google-research/simclr adds both directions' means."""

_RING_BYTES = 4 << 30
"""Above this size of all projections together, holding them is what hurts, and they go round instead."""
_HALF_BYTES = 4 << 20
"""From 8192 projections of 128 numbers on, computing pairs twice costs CPU ranks more than the traffic saved."""


class NTXent(NamedTuple):
    """The loss of one step and what it says about the representation, the same on all ranks.

    Every field but `loss` is detached; all are tensors on z's device that the host has not read.
    """

    loss: Tensor
    """0-dim. Mean over all M anchors, in nats; log(2B - 1) for collapsed projections (twice that in flavour `paper`).

    Call backward on it, outside autocast: this rank's gradient is W times its part of the global gradient, so that
    the mean over the W ranks is the gradient of this number.
    """
    accuracy: Tensor
    """0-dim. Share of anchors that are more similar to their positive than to any other projection of the other view
    (contrastive accuracy as google-research/simclr logs it; a tie counts as a miss)."""
    entropy: Tensor
    """0-dim. Mean entropy, in nats, of an anchor's softmax over the B projections of the other view."""
    positive_similarity: Tensor
    """0-dim. Mean cosine similarity of positives."""
    negative_similarity: Tensor
    """0-dim. Mean cosine similarity of negatives."""
    nonfinite_rows: Tensor
    """(W,). Projections of each rank that hold a NaN or an infinity; then `loss` is NaN on every rank."""


def nt_xent(
    view_a: Tensor,
    view_b: Tensor,
    temperature: float,
    *,
    group: ProcessGroup | None = None,
    images: Sequence[int] | None = None,
    flavour: Flavour = "standard",
    exchange: Literal["auto"] | ExchangeName = "auto",
) -> Tensor:
    """Exact NT-Xent (SimCLR, Eq. 1) between two views, in any torch program, on one process or many.

    Row i of `view_a` and row i of `view_b` are projections of two views of one image: each other's positive. All other
    rows, of both views and of all ranks, are negatives. Memory is of the order of the projections; the matrix of
    similarities is never stored. Computed in float32 (float64 for float64 input), also under autocast.

    With a process group (gloo or NCCL) every rank calls this with its own rows, and their number may differ by rank.
    The value returned is the loss of the *global* batch, the same on every rank. The gradient is scaled such that the
    *mean* over ranks of parameter gradients, as DistributedDataParallel takes it, is the gradient of that value; a
    program that sums them instead divides the loss by the world size. Backward runs no collective.

    Args:
        view_a: Projections of the first views, (n, D); need not be normalized.
        view_b: Projections of the second views, (n, D), of the same dtype and device.
        temperature: Divides the cosine similarities; finite, above 0, the same on all ranks.
        group: Ranks that share the global batch; None = all.
        images: Rows n of every rank, in rank order, where the caller knows them. None asks the other ranks each time
            and compares what must agree, which on a GPU makes the host wait for the device.
        flavour: "standard" is the mean of Algorithm 1, "paper" twice that, as Google's code has it.
        exchange: How ranks share projections, see `learn.exchange`; "auto" chooses. The result is the same.

    Returns:
        0-dim loss, in nats, differentiable once.

    Raises:
        ConfigError: An argument that cannot be, or views that do not pair up: on the rank that has it. Other columns,
            dtypes, temperatures or options on another rank, fewer than two images in the global batch: on all alike.
        NumericsError: A projection is not finite; names the ranks, on all alike. Only on CPU: on a GPU the host would
            have to wait, so there the loss is NaN, and `distributed_nt_xent` says on which rank.

    Example:
        >>> loss = simclr_ray.nt_xent(projector(encoder(a)), projector(encoder(b)), temperature=0.1)
        >>> loss.backward()
    """
    if view_a.shape != view_b.shape or view_a.dtype != view_b.dtype or view_a.device != view_b.device:
        raise ConfigError(
            "the two views do not pair up",
            where="NT-Xent",
            got=f"{describe(view_a)} and {describe(view_b)}",
            expected="two (n, D) tensors of one shape, dtype and device, row i of both from the same image",
        )
    z = torch.cat([view_a, view_b])
    result = _nt_xent(z, temperature, group, images, flavour, exchange, None, "torch", refuse=z.device.type == "cpu")
    return result.loss


def distributed_nt_xent(
    z: Tensor,
    temperature: float,
    group: ProcessGroup | None = None,
    *,
    images: Sequence[int] | None = None,
    flavour: Flavour = "standard",
    exchange: Literal["auto"] | ExchangeName = "auto",
    tile: int | None = None,
    kernel: KernelName = "torch",
) -> NTXent:
    """NT-Xent of this rank's anchors against the projections of all ranks, with the step's statistics.

    A projection with norm below 1e-6 counts as zero and gets no gradient; a NaN anywhere makes every rank's loss NaN.

    Args:
        z: This rank's projections, (2n, D), ordered [views a; views b]; need not be normalized; n may differ by rank.
        temperature: Divides the cosine similarities; finite and above 0; the same on all ranks.
        group: Ranks that share the global batch; None = all. Works without a process group, as one rank.
        images: Images n of every rank, where the caller knows them; then ranks trust each other, and either all or none
            of them want a gradient. None asks the other ranks, and compares what must agree; on a GPU that makes the
            host wait for the device.
        flavour: See `Flavour`.
        exchange: "gather", "half", "ring" (see `learn.exchange`), or "auto": ring above 4 GiB of projections, half on
            CPUs from 4 MiB (8192 rows of 128 numbers), else gather.
        tile: Rows and columns of a tile; None = 512 on a CPU, whose cache it fits, and 4096 on a GPU.
        kernel: "torch" runs anywhere. "triton" keeps tiles on the chip (`learn.triton_tiles`), on CUDA in float32 from
            temperature 1/70 on; not timed on a GPU yet, so nothing chooses it by itself.

    Returns:
        The loss to differentiate and the global statistics.

    Raises:
        ConfigError: See `nt_xent`.
    """
    return _nt_xent(z, temperature, group, images, flavour, exchange, tile, kernel, refuse=False)


def _nt_xent(
    z: Tensor, temperature: float, group: ProcessGroup | None, images: Sequence[int] | None, flavour: Flavour,
    exchange: str, tile: int | None, kernel: KernelName, *, refuse: bool,
) -> NTXent:  # fmt: skip
    check_temperature(temperature)
    check_matrix(z)
    check_choice("flavour", flavour, get_args(Flavour))
    check_choice("exchange", exchange, ("auto", *get_args(ExchangeName)))
    check_choice("kernel", kernel, get_args(KernelName))
    if tile is not None and tile < 1:
        raise ConfigError("a tile needs rows", where="NT-Xent", got=f"tile={tile}", expected="1 or more")
    check_member(group)
    wants_gradient = torch.is_grad_enabled() and z.requires_grad
    loss, statistics, nonfinite, _ = _nt_xent_op(
        z, temperature, group_name(group), None if images is None else list(images), exchange, tile or 0,
        2.0 if flavour == "paper" else 1.0, wants_gradient, kernel, refuse,
    )  # fmt: skip
    # Detached, or who keeps them would keep the graph of the whole step.
    accuracy, entropy, positive, negative = statistics.detach().unbind()
    return NTXent(loss, accuracy, entropy, positive, negative, nonfinite.detach())


# A custom op: opaque to torch.compile, so that a compiled training step calls it without a graph break, and one
# autograd.Function underneath. Its inputs are plain values, so the process group goes by name.
@torch.library.custom_op("simclr_ray::nt_xent", mutates_args=())
def _nt_xent_op(
    z: Tensor, temperature: float, group: str, images: list[int] | None, exchange: str, tile: int, factor: float,
    wants_gradient: bool, kernel: str, refuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss (), statistics (4,), non-finite rows by rank (W,), and d(W loss)/dz (2n, D); the last empty if unwanted."""
    # TF32 or bf16 products would move logits by 5e-4 / temperature.
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False), full_precision_products():
        return _forward(
            z, temperature, group_of(group), images, exchange, tile, factor, wants_gradient, kernel, refuse=refuse
        )


@_nt_xent_op.register_fake
def _(
    z: Tensor, temperature: float, group: str, images: list[int] | None, exchange: str, tile: int, factor: float,
    wants_gradient: bool, kernel: str, refuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = compute_dtype(z)
    ranks = world_size(group_of(group))
    gradient = z.new_empty(z.shape if wants_gradient else (0,), dtype=dtype)
    return z.new_empty((), dtype=dtype), z.new_empty(4, dtype=dtype), z.new_empty(ranks, dtype=torch.float64), gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3])
    ctx.dtype = inputs[0].dtype


def _backward(
    ctx: Any, of_loss: Tensor | None, _statistics: None, _nonfinite: None, of_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    if of_gradient is not None:  # the saved gradient is being differentiated in its turn
        raise ConfigError(
            "NT-Xent has no second derivative: its gradient is computed in the forward pass",
            where="NT-Xent",
            got="a backward pass through the gradient (create_graph=True)",
            fix="use simclr_ray.learn.reference.nt_xent for second derivatives; it stores the whole matrix",
        )
    (gradient,) = ctx.saved_tensors
    of_z = None if of_loss is None else (gradient * of_loss).to(ctx.dtype)
    return of_z, *[None] * 9


_nt_xent_op.register_autograd(_backward, setup_context=_setup_context)


def _forward(
    z: Tensor, temperature: float, group: ProcessGroup | None, images: Sequence[int] | None, exchange: str, tile: int,
    factor: float, wants_gradient: bool, kernel_name: str, *, refuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if images is None:
        told = Told(temperature, exchange, kernel_name, factor, wants_gradient)
        counts, wants_gradient = images_by_rank(z, told, group)
    else:
        counts = list(images)
    check_images(counts, len(z), rank(group), world_size(group))
    anchors, ranks = 2 * sum(counts), len(counts)
    unit, norm = normalize(z)  # (2, n, D), (2, n, 1)
    kernel = make_kernel(kernel_name, temperature, unit, tile)
    way = make_exchange(
        _way(exchange, z.device, ranks, anchors * z.shape[1] * unit.element_size()), unit, counts, group
    )
    unit = way.unit

    sums = kernel.new_sums(way.tracked, like=unit)
    kernel.add_own(unit, sums.images(way.own))
    for block in way.blocks():
        mirror = sums.images(block.images) if way.mirrored else None
        kernel.add_block(unit, block.columns, sums.images(way.own), mirror, block.quadrants)
    facts = facts_of(way.complete_sums(sums), unit, temperature, wide=kernel.wide)
    everyone, normalizer = gather_facts(own_numbers(facts, norm, unit), facts.normalizer, counts, group)
    loss, statistics, nonfinite = global_numbers(everyone, anchors)
    if refuse:
        refuse_nonfinite(nonfinite)
    loss, scale = loss * factor, factor * ranks / (anchors * temperature)
    if not wants_gradient:
        return loss.to(unit.dtype), statistics.to(unit.dtype), nonfinite, unit.new_empty(0)

    mine = slice(sum(counts[: rank(group)]), sum(counts[: rank(group) + 1]))
    gradient = unit.new_zeros((2, way.tracked, unit.shape[2]))
    kernel.own_gradient(unit, normalizer[:, mine], gradient[:, way.own])
    for block in way.blocks():
        kernel.block_gradient(
            unit, block.columns, normalizer[:, mine], normalizer[:, block.images], gradient[:, way.own],
            gradient[:, block.images] if way.mirrored else None, block.quadrants,
        )  # fmt: skip
    gradient = way.complete_gradient(gradient)
    finish_gradient(gradient, unit, norm, facts.pull, scale)
    return loss.to(unit.dtype), statistics.to(unit.dtype), nonfinite, gradient.flatten(0, 1)


def _way(exchange: str, device: torch.device, ranks: int, num_bytes: int) -> ExchangeName:
    """Resolve "auto", by what is the same on every rank; `num_bytes` are those of all projections together."""
    if exchange != "auto":
        return exchange  # type: ignore[return-value]
    if ranks == 1:
        return "gather"
    if num_bytes > _RING_BYTES:
        return "ring"
    return "half" if device.type == "cpu" and num_bytes >= _HALF_BYTES else "gather"
