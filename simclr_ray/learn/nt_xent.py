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

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from simclr_ray.collectives import all_gather_equal, group_name, group_of, rank, world_size
from simclr_ray.errors import ConfigError
from simclr_ray.learn.exchange import ExchangeName, gather_by_view, make_exchange
from simclr_ray.learn.kernels import CPU_TILE, KernelName, make_kernel
from simclr_ray.learn.loss_input import check_images, check_temperature, describe, images_by_rank, refuse_nonfinite
from simclr_ray.learn.tiles import RowSums

Flavour = Literal["standard", "paper"]
"""`standard`: the mean of Algorithm 1. `paper`: twice that, as google-research/simclr adds both directions' means."""

_SMALLEST_NORM = 1e-6
"""Rows shorter than this count as dead: F.normalize's 1e-12 would hand them gradients of 1e11."""
_RING_BYTES = 4 << 30
"""Above this size of all projections together, holding them is what hurts, and they go round instead."""


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
        flavour: "standard" is the mean of Algorithm 1, "paper" twice that, as Google's code has it.
        exchange: How ranks share projections, see `learn.exchange`; "auto" chooses. The result is the same.

    Returns:
        0-dim loss, in nats, differentiable once.

    Raises:
        ConfigError: A temperature out of range, views that do not pair up, other columns, dtypes or temperatures on
            another rank, or fewer than two images in the global batch. On all ranks alike, but for the first two.
        NumericsError: A projection is not finite; names the ranks. Only on CPU: on a GPU looking would stall the
            stream, and the loss is NaN there.

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
    result = distributed_nt_xent(z, temperature, group, flavour=flavour, exchange=exchange)
    if z.device.type == "cpu":
        refuse_nonfinite(result.nonfinite_rows)
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
        images: Images n of every rank, where the caller knows them. None asks the other ranks, and compares columns,
            dtype and temperature with theirs; on a GPU that makes the host wait for the device.
        flavour: See `Flavour`.
        exchange: "gather", "half", "ring" (see `learn.exchange`), or "auto": ring above 4 GiB of projections, half on
            CPUs from 8192 rows, else gather.
        tile: Rows and columns of a tile; None = 512 on a CPU, whose cache it fits, and 4096 on a GPU.
        kernel: "torch" runs anywhere. "triton" keeps tiles on the chip (`learn.triton_tiles`), on CUDA in float32 from
            temperature 1/70 on; not timed on a GPU yet, so nothing chooses it by itself.

    Returns:
        The loss to differentiate and the global statistics.

    Raises:
        ConfigError: See `nt_xent`.
    """
    check_temperature(temperature)
    if z.dim() != 2 or not z.is_floating_point():
        raise ConfigError(
            "projections must be a floating-point matrix",
            where="NT-Xent",
            got=describe(z),
            expected="(2n, D), [views a; views b]",
        )
    wants_gradient = torch.is_grad_enabled() and z.requires_grad
    loss, statistics, nonfinite, _ = _nt_xent_op(
        z, temperature, group_name(group), None if images is None else list(images), exchange, tile or 0,
        2.0 if flavour == "paper" else 1.0, wants_gradient, kernel,
    )  # fmt: skip
    accuracy, entropy, positive, negative = statistics.unbind()
    return NTXent(loss, accuracy, entropy, positive, negative, nonfinite)


# A custom op: opaque to torch.compile, so that a compiled training step calls it without a graph break, and one
# autograd.Function underneath. Its inputs are plain values, so the process group goes by name.
@torch.library.custom_op("simclr_ray::nt_xent", mutates_args=())
def _nt_xent_op(
    z: Tensor, temperature: float, group: str, images: list[int] | None, exchange: str, tile: int, factor: float,
    wants_gradient: bool, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss (), statistics (4,), non-finite rows by rank (W,), and d(W loss)/dz (2n, D); the last empty if unwanted."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False), _full_precision_products():
        return _forward(z, temperature, group_of(group), images, exchange, tile, factor, wants_gradient, kernel)  # type: ignore[arg-type]


@_nt_xent_op.register_fake
def _(
    z: Tensor, temperature: float, group: str, images: list[int] | None, exchange: str, tile: int, factor: float,
    wants_gradient: bool, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = _compute_dtype(z)
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
    return of_z, *[None] * 8


_nt_xent_op.register_autograd(_backward, setup_context=_setup_context)


def _forward(
    z: Tensor, temperature: float, group: ProcessGroup | None, images: Sequence[int] | None, exchange: str, tile: int,
    factor: float, wants_gradient: bool, kernel_name: KernelName,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    counts = images_by_rank(z, temperature, group) if images is None else list(images)
    check_images(counts, len(z), rank(group))
    anchors, ranks = 2 * sum(counts), len(counts)
    unit, norm = _normalize(z)  # (2, n, D), (2, n, 1)
    kernel = make_kernel(kernel_name, temperature, unit, tile)
    way = make_exchange(_way(exchange, z.device, anchors, z.shape[1]), unit, counts, group)

    sums = kernel.new_sums(way.tracked, like=unit)
    kernel.add_own(unit, sums.images(way.own))
    for block in way.blocks():
        mirror = sums.images(block.images) if way.mirrored else None
        kernel.add_block(unit, block.columns, sums.images(way.own), mirror, block.quadrants)
    facts = _facts(way.complete_sums(sums), unit, temperature, wide=kernel.wide)
    loss, statistics, nonfinite = _global_numbers(facts, norm, unit, anchors, group)
    loss, scale = loss * factor, factor * ranks / (anchors * temperature)
    if not wants_gradient:
        return loss.to(unit.dtype), statistics.to(unit.dtype), nonfinite, unit.new_empty(0)

    normalizer = gather_by_view(facts.normalizer, counts, group)  # (2, B)
    mine = slice(sum(counts[: rank(group)]), sum(counts[: rank(group) + 1]))
    gradient = unit.new_zeros((2, way.tracked, unit.shape[2]))
    kernel.own_gradient(unit, normalizer[:, mine], gradient[:, way.own])
    for block in way.blocks():
        kernel.block_gradient(
            unit, block.columns, normalizer[:, mine], normalizer[:, block.images], gradient[:, way.own],
            gradient[:, block.images] if way.mirrored else None, block.quadrants,
        )  # fmt: skip
    gradient = way.complete_gradient(gradient)
    _finish_gradient(gradient, unit, _inverse(norm), facts.pull, scale)
    return loss.to(unit.dtype), statistics.to(unit.dtype), nonfinite, gradient.flatten(0, 1)


class _Facts(NamedTuple):
    """What this rank's anchors add up to; (2, n) float64 unless said otherwise."""

    losses: Tensor
    hits: Tensor
    entropy: Tensor
    positive: Tensor
    """(n,) cosine similarity of the two views."""
    normalizer: Tensor
    """In the projections' dtype; see `Kernel.own_gradient`."""
    pull: Tensor
    """(n,) in the projections' dtype: q of both views, with which an image's views attract each other."""


def _facts(sums: RowSums, unit: Tensor, temperature: float, *, wide: bool) -> _Facts:
    same, cross, cross_times_logit = sums.totals.unbind()
    shift = sums.shift.double()
    positive = _row_dots(unit[0], unit[1])  # (n,)
    logit = (positive / temperature).double()
    x = (same + cross).log() + shift - logit
    losses = torch.logaddexp(x, x.new_zeros(()))  # softplus; F.softplus turns into x itself from 20 on
    # Over the other view's B projections, the positive among them.
    term = (logit - shift).exp()
    candidates = cross + term
    entropy = candidates.log() + shift - (cross_times_logit + logit * term) / candidates
    # lse_i = s_positive + softplus(x_i), which keeps its precision where either part vanishes.
    lse = logit + losses
    return _Facts(
        losses=losses,
        hits=(positive / temperature > sums.hardest).double(),
        entropy=entropy,
        positive=positive.double(),
        normalizer=(lse if wide else (-lse).exp()).to(unit.dtype),
        pull=x.sigmoid().sum(dim=0).to(unit.dtype),
    )


def _global_numbers(
    facts: _Facts, norm: Tensor, unit: Tensor, anchors: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, statistics (4,) in the order of `NTXent`, and non-finite rows by rank, from one small gather.

    The negatives' mean similarity needs no look at the pairs: all similarities together are |sum of z|^2.
    """
    scalars = [
        facts.losses.sum(),
        facts.hits.sum(),
        facts.entropy.sum(),
        2 * facts.positive.sum(),
        (_row_dots(unit[0], unit[0]) + _row_dots(unit[1], unit[1])).sum(dtype=torch.float64),
        (~torch.isfinite(norm)).sum(dtype=torch.float64),
    ]
    mine = torch.cat([torch.stack(scalars), unit.sum(dim=(0, 1)).double()])
    everyone = all_gather_equal(mine, group)  # (W, 6 + D); summed in rank order, so alike on all ranks to the bit
    total = everyone.sum(dim=0)
    loss, hits, entropy, positives, squares = (total[i] / anchors for i in range(5))
    pairs = anchors * (anchors - 2)
    negative = (total[6:].square().sum() - (squares + positives) * anchors) / pairs
    return loss, torch.stack([hits, entropy, positives, negative]), everyone[:, 5].clone()


def _finish_gradient(gradient: Tensor, unit: Tensor, inverse_norm: Tensor, pull: Tensor, scale: float) -> None:
    """Add the positives' part to the sums over negatives, and go back through the normalization; in place."""
    rows = max(1, CPU_TILE * CPU_TILE // max(1, unit.shape[2]))
    for start in range(0, unit.shape[1], rows):  # in pieces, for the temporaries' sake
        part = slice(start, start + rows)
        for view in (0, 1):
            piece, z = gradient[view, part], unit[view, part]
            piece.addcmul_(pull[part, None], unit[1 - view, part], value=-1.0).mul_(scale)
            piece.addcmul_(_row_dots(piece, z)[:, None], z, value=-1.0).mul_(inverse_norm[view, part])


def _normalize(z: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows by view, (2, n, D), in float32 or wider, and |z|, (2, n, 1). NaN stays NaN, infinity becomes NaN."""
    z = z.detach().to(_compute_dtype(z)).view(2, len(z) // 2, z.shape[1])
    norm = torch.linalg.vector_norm(z, dim=2, keepdim=True)
    return (z * _inverse(norm)).contiguous(), norm


def _inverse(norm: Tensor) -> Tensor:
    """1 / |z|, and 0 for dead rows: they become zero and get no gradient."""
    return torch.where(norm < _SMALLEST_NORM, 0.0, 1.0 / norm.clamp_min(_SMALLEST_NORM))


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """x_i . y_i of (n, D) each, without an (n, D) temporary."""
    return torch.bmm(x.unsqueeze(1), y.unsqueeze(2)).flatten()


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _way(exchange: str, device: torch.device, rows: int, dim: int) -> ExchangeName:
    """Resolve "auto", by what is the same on every rank."""
    if exchange != "auto":
        return exchange  # type: ignore[return-value]
    if rows * dim * 4 > _RING_BYTES:
        return "ring"
    return "half" if device.type == "cpu" and rows >= 8192 else "gather"


@contextlib.contextmanager
def _full_precision_products() -> Iterator[None]:
    """Logits keep float32's precision: TF32 or bf16 products would move them by 5e-4 / temperature."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
