"""What may go into the loss, and the sentences for what may not.

What only the ranks together can see (`images_by_rank`) is exchanged first and then judged by all of them alike, for a
rank that raised alone would leave the others waiting in a collective. Only a rank whose own arguments make no sense
(the checks of one rank) does that: the program, not the batch, is at fault then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from simclr_ray.collectives import all_gather_equal, world_size
from simclr_ray.errors import ConfigError, NumericsError

_SMALLEST_TEMPERATURE = 1e-30
"""Below it 1 / temperature and products with it leave float32."""
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_EXCHANGES = ("auto", "gather", "half", "ring")
_KERNELS = ("torch", "triton")


class Told(NamedTuple):
    """What a rank was told, and tells the others."""

    temperature: float
    exchange: str
    kernel: str
    factor: float
    wants_gradient: bool


def images_by_rank(z: Tensor, told: Told, group: ProcessGroup | None) -> tuple[list[int], bool]:
    """Images of every rank, from what the ranks say of themselves; refuses together what does not fit together.

    Args:
        z: This rank's projections, (2n, D).
        told: This rank's options. All but `wants_gradient` must be the same on every rank.
        group: Ranks that take part; None = all.

    Returns:
        Images n of every rank, and whether any of them wants a gradient: then all help to make it.

    Raises:
        ConfigError: On every rank alike. Also for an odd number of rows, before halving hides it.
    """
    mine = [
        len(z), z.shape[1], _DTYPES.index(z.dtype) if z.dtype in _DTYPES else -1, told.temperature,
        _EXCHANGES.index(told.exchange), _KERNELS.index(told.kernel), told.factor, told.wants_gradient,
    ]  # fmt: skip
    if world_size(group) == 1:
        answers = [mine]
    else:
        answers = all_gather_equal(z.new_tensor(mine, dtype=torch.float64), group).tolist()
    rows, *rest, wants = (list(column) for column in zip(*answers, strict=True))
    names = ("dimensions D", "dtypes", "temperatures", "exchanges", "kernels", "flavours (factors of the loss)")
    spellings: dict[str, tuple[object, ...]] = {"dtypes": _DTYPES, "exchanges": _EXCHANGES, "kernels": _KERNELS}
    for what, values in zip(names, rest, strict=True):
        if len(set(values)) > 1:
            shown = [spellings[what][int(v)] if what in spellings and v >= 0 else f"{v:g}" for v in values]
            raise ConfigError(
                f"ranks have different {what}",
                where="NT-Xent",
                got=", ".join(f"{value} on rank {r}" for r, value in enumerate(shown)),
                expected="the same on every rank",
            )
    if any(count % 2 for count in rows):
        raise ConfigError(
            "projections do not form view pairs",
            where="NT-Xent",
            got=f"{[int(count) for count in rows]} rows by rank",
            expected="an even number of rows, [views a; views b]",
        )
    return [int(count) // 2 for count in rows], any(wants)


def check_images(images: Sequence[int], rows: int, own: int, ranks: int) -> None:
    """Refuse fewer than two images in all, and other ranks or `rows` than were announced."""
    if len(images) != ranks or min(images) < 0:
        raise ConfigError(
            "the images announced do not fit the ranks",
            where="NT-Xent",
            got=f"images={list(images)}",
            expected=f"{ranks} numbers, one a rank, none below 0",
        )
    if rows != 2 * images[own]:
        raise ConfigError(
            "projections are not the images that were announced",
            where="NT-Xent",
            got=f"{rows} rows on rank {own}",
            expected=f"{2 * images[own]}, two views of {images[own]} images",
        )
    if sum(images) < 2:
        raise ConfigError(
            "an anchor has no negatives",
            where="NT-Xent",
            got=f"a global batch of {sum(images)} images",
            expected="at least 2 images",
            fix="raise the global batch size",
        )


def check_temperature(temperature: float) -> None:
    """Refuse what cannot divide a similarity."""
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise ConfigError(
            "the temperature must be a Python number; it cannot be learned through this loss",
            where="loss.temperature",
            got=type(temperature).__name__,
            fix="use float(temperature)",
        )
    if not (math.isfinite(temperature) and temperature > _SMALLEST_TEMPERATURE):
        raise ConfigError(
            "cannot divide similarities by this temperature",
            where="loss.temperature",
            got=temperature,
            expected="a finite number above 0" + (f" ({_SMALLEST_TEMPERATURE:g})" if temperature > 0 else ""),
            fix="0.1 suits ImageNet, 0.5 CIFAR-10 (SimCLR, section 5.1 and appendix B.9)",
        )


def check_matrix(z: Tensor) -> None:
    """Refuse what is no matrix of projections."""
    if z.dim() != 2 or not z.is_floating_point():
        raise ConfigError(
            "projections must be a floating-point matrix",
            where="NT-Xent",
            got=describe(z),
            expected="(2n, D), [views a; views b]",
        )


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a misspelt option."""
    if value not in choices:
        raise ConfigError(f"unknown {option}", where="NT-Xent", got=repr(value), expected=" or ".join(choices))


def check_member(group: ProcessGroup | None) -> None:
    """Refuse the mark that torch gives a rank for a group which it is not in."""
    if isinstance(group, int):
        raise ConfigError(
            "this rank is not a member of the group", where="NT-Xent", fix="call the loss on the group's ranks only"
        )


def describe(x: Tensor) -> str:
    """Shape, dtype and device, for a message."""
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def refuse_nonfinite(rows: Tensor) -> None:
    """Look at `NTXent.nonfinite_rows`; on a GPU the host waits for it.

    Raises:
        NumericsError: Naming the ranks and how many of their projections are not finite; on every rank alike.
    """
    found = describe_nonfinite(rows)
    if found:
        raise NumericsError(
            "cannot compare projections that are not finite",
            where="NT-Xent",
            got=", ".join(found),
            fix="lower the learning rate, or look at the images of these rows",
        )


def describe_nonfinite(rows: Tensor) -> list[str]:
    """Ranks that hold projections which are not finite, in words; `rows` is `NTXent.nonfinite_rows`."""
    return [f"{int(count)} non-finite projections on rank {r}" for r, count in enumerate(rows.tolist()) if count]
