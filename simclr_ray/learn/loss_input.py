"""What may go into the loss, and the sentences for what may not.

Ranks must refuse together: one that raised alone would leave the others waiting in a collective. So what only the
ranks together can see (`images_by_rank`) is exchanged first and then judged by all of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from simclr_ray.collectives import all_gather_equal, world_size
from simclr_ray.errors import ConfigError, NumericsError

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def images_by_rank(z: Tensor, temperature: float, group: ProcessGroup | None) -> list[int]:
    """Images of every rank, from what the ranks say of themselves; refuses together what does not fit together.

    An odd number of rows is refused here too, before halving hides it.
    """
    mine = [len(z), z.shape[1], _DTYPES.index(z.dtype) if z.dtype in _DTYPES else -1, temperature]
    if world_size(group) == 1:
        told = [mine]
    else:
        told = all_gather_equal(z.new_tensor(mine, dtype=torch.float64), group).tolist()
    rows, dims, dtypes, temperatures = (list(column) for column in zip(*told, strict=True))
    for what, values in (("dimensions D", dims), ("dtypes", dtypes), ("temperatures", temperatures)):
        if len(set(values)) > 1:
            shown = [str(_DTYPES[int(v)]) if what == "dtypes" and v >= 0 else f"{v:g}" for v in values]
            raise ConfigError(
                f"ranks have projections of different {what}",
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
    return [int(count) // 2 for count in rows]


def check_images(images: Sequence[int], rows: int, own: int) -> None:
    """Refuse fewer than two images in all, and other `rows` than rank `own` announced."""
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
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(
            "cannot divide similarities by this temperature",
            where="loss.temperature",
            got=temperature,
            expected="a finite number above 0",
            fix="0.1 suits ImageNet, 0.5 CIFAR-10 (SimCLR, section 5.1 and appendix B.9)",
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
