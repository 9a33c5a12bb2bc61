"""A batch that does not fit into a GPU. Every restart would meet it again, so the run ends and says what would fit."""

from __future__ import annotations

import torch

from simclr_ray.errors import ConfigError, first_line
from simclr_ray.train.derive import Derived


def out_of_memory(error: torch.OutOfMemoryError, derived: Derived, *, at: str, workers: int) -> ConfigError:
    """The error for a rank whose device has no memory left.

    Args:
        error: Of torch.
        derived: The run's numbers.
        at: Where the rank stood.
        workers: Ranks.
    """
    images = -(-derived.units_per_micro_batch // workers) * derived.unit_rows
    ways = []
    if workers < derived.units_per_micro_batch:
        more = min(2 * workers, derived.units_per_micro_batch)
        ways.append(f"cluster.workers={more} (the run goes on from its newest checkpoint, with the same curve)")
    smaller = smaller_micro_batch(derived)
    if smaller is not None:
        ways.append(
            f"train.micro_batch={smaller} (the loss stays that of the whole batch, but batch norm's statistics are of "
            "so many images: another run, so give --fresh or another run.folder)"
        )
    ways.append("model.encoder, model.width or views.size smaller (another run too)")
    return ConfigError(
        f"out of memory on {at}",
        got=f"{_used()}{first_line(error)}",
        expected=f"room for two views of {images} images at a time",
        fix="use " + "\n  or ".join(ways),
    )


def smaller_micro_batch(derived: Derived) -> int | None:
    """The next smaller `train.micro_batch` that divides the global batch into whole units; None at a single unit."""
    units = derived.units_per_micro_batch
    fitting = [smaller for smaller in range(1, units) if derived.units_per_step % smaller == 0]
    return fitting[-1] * derived.unit_rows if fitting else None


def _used() -> str:
    if not torch.cuda.is_available():
        return ""
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties().total_memory
    return f"a peak of {peak / 2**30:.1f} of {total / 2**30:.1f} GiB; "
