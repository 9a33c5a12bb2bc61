"""Every number of a run that follows from others, computed once, printed and written to `resolved.yaml`.

Nothing here depends on the world size, for nothing that is learned may. `shares` says what each rank gets of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from simclr_ray.config import Config, DataConfig, ViewsConfig
from simclr_ray.data.decode import Limits
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import UnitTable, share, units_per_block, units_per_micro_batch, units_per_step
from simclr_ray.errors import ConfigError
from simclr_ray.learn.optim import peak_learning_rate
from simclr_ray.views.policy import Policy, preset


@dataclass(frozen=True)
class Derived:
    """Numbers of a run."""

    samples: int
    """Images of the data set."""
    unit_rows: int
    """Images of a unit, R."""
    units_per_epoch: int
    rows_left_out: int
    """Images that fill no unit and are never seen; fewer than R."""
    units_per_step: int
    """U = B / R."""
    units_per_micro_batch: int
    """Units that go through the encoder together; also the largest number of workers."""
    steps_per_epoch: float
    total_steps: int
    warmup_steps: int
    peak_learning_rate: float
    negatives_per_anchor: int
    """2 B - 2."""

    def as_dict(self) -> dict[str, Any]:
        """For `resolved.yaml`."""
        return asdict(self)

    def epoch_at(self, step: int) -> float:
        """Passes of the data set after `step` steps."""
        return step / self.steps_per_epoch


def derive(config: Config, manifest: Manifest) -> Derived:
    """Derive the numbers of a run.

    Raises:
        ConfigError: when the batch does not fit the data set, or neither epochs nor steps are given.
    """
    global_batch = config.train.global_batch
    table = UnitTable(manifest)
    per_step = units_per_step(global_batch, manifest.unit_rows)
    per_micro_batch = units_per_micro_batch(config.train.micro_batch, per_step, manifest.unit_rows)
    usable = table.num_units * manifest.unit_rows
    if table.num_units < per_step:
        largest = table.num_units * manifest.unit_rows
        raise ConfigError(
            f"one global batch needs more images than the data set has ({manifest.rows} in {manifest.folder})",
            where="train.global_batch",
            got=global_batch,
            expected=f"at most {largest}" if largest else f"a data set of at least {manifest.unit_rows} images",
            fix=f"use train.global_batch={largest}, or pack more images" if largest else "pack more images",
        )
    steps_per_epoch = usable / global_batch
    total = config.train.steps
    if total is None:
        if config.train.epochs is None:
            raise ConfigError("neither train.epochs nor train.steps is set", fix="set one, such as train.epochs=100")
        total = max(1, round(config.train.epochs * steps_per_epoch))
    warmup = round(config.optim.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise ConfigError(
            f"the warm-up of {warmup} steps leaves nothing of {total} steps",
            where="optim.warmup_epochs",
            got=config.optim.warmup_epochs,
            expected=f"less than {total / steps_per_epoch:.3g}",
            fix=f"use {0.1 * total / steps_per_epoch:.2g}, a tenth of the run",
        )
    peak = peak_learning_rate(config.optim.rule, config.optim.base_learning_rate, global_batch)
    return Derived(
        samples=manifest.rows,
        unit_rows=manifest.unit_rows,
        units_per_epoch=table.num_units,
        rows_left_out=table.rows_left_out,
        units_per_step=per_step,
        units_per_micro_batch=per_micro_batch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        peak_learning_rate=peak,
        negatives_per_anchor=2 * global_batch - 2,
    )


def limits_of(data: DataConfig) -> Limits:
    """What is decoded at all."""
    return Limits(
        max_pixels=data.max_pixels,
        max_side=data.max_side,
        min_side=data.min_side,
        max_bytes=data.max_bytes,
        background=data.background,
        animated=data.animated,
    )


COPIED_PROBABILITIES = (
    "flip_probability",
    "jitter_probability",
    "grayscale_probability",
    "blur_probability",
    "solarize_probability",
)
"""Settings of `views` that replace the policy's number of the same name."""


def policy_of(views: ViewsConfig) -> Policy:
    """The augmentation policy: the preset, with what the config sets on top of it."""
    policy = preset(views.preset, flavour=views.flavour, size=views.size, strength=views.strength)
    changes: dict[str, Any] = {
        name: getattr(views, name) for name in COPIED_PROBABILITIES if getattr(views, name) is not None
    }
    if views.crop_scale_min is not None:
        changes["crop_scale"] = (views.crop_scale_min, policy.crop_scale[1])
    return Policy.model_validate(policy.model_dump() | changes)


MOST_BLOCK_BYTES = 80 << 20
"""Of finished views: four units of 64 at 224 pixels. Ray Data would cut a block of more than 128 MiB."""


def unit_bytes(config: Config, derived: Derived) -> int:
    """Memory of a unit's finished views."""
    return derived.unit_rows * 2 * 3 * policy_of(config.views).size ** 2


def block_units(config: Config, derived: Derived, workers: int) -> int:
    """Units that the stream deals together, as many as fit a task and memory and leave the workers' shares alone."""
    most = min(config.data.units_per_task, MOST_BLOCK_BYTES // unit_bytes(config, derived))
    fewest = min(config.cluster.min_workers or workers, workers)
    return units_per_block(derived.units_per_micro_batch, fewest=fewest, workers=workers, most=most)


def bytes_ahead(config: Config, derived: Derived) -> int:
    """Memory for the steps that the stream may be ahead, and for a few tasks' output at least, or it would stutter."""
    units = max(config.data.steps_ahead * derived.units_per_step, 4 * config.data.units_per_task)
    return units * unit_bytes(config, derived)


def check_world_size(world_size: int, derived: Derived) -> None:
    """Every rank needs a unit in every step, and in every micro-batch of it.

    Raises:
        ConfigError: more workers than units in a step or micro-batch.
    """
    units = derived.units_per_micro_batch
    if world_size > units:
        whole = units == derived.units_per_step
        raise ConfigError(
            f"a {'step' if whole else 'micro-batch'} has {units} units of {derived.unit_rows} images, "
            "so some workers would get none",
            where="cluster.workers",
            got=world_size,
            expected=f"1 to {units}",
            fix=f"use fewer workers, or train.{'global' if whole else 'micro'}_batch={world_size * derived.unit_rows} "
            "or more",
        )


def shares(derived: Derived, world_size: int, per_block: int = 1) -> Sequence[int]:
    """Images of the first step that fall on each rank; later steps may deal the uneven rest to other ranks."""
    blocks = derived.units_per_step // per_block
    return [
        per_block * derived.unit_rows * len(share(0, rank, per_step=blocks, world_size=world_size))
        for rank in range(world_size)
    ]


def sentences(config: Config, derived: Derived) -> list[str]:
    """The derived numbers, for people; with these lines anyone can rebuild them."""
    d, t, o = derived, config.train, config.optim
    left = f", {d.rows_left_out} left out" if d.rows_left_out else ""
    pieces = d.units_per_step // d.units_per_micro_batch
    size = t.global_batch // pieces
    micro = [f"micro-batches: {pieces} of {size} images a step; the loss is over all of them"] if pieces > 1 else []
    rule = {
        "linear": f"{o.base_learning_rate:g} * {t.global_batch} / 256",
        "sqrt": f"{o.base_learning_rate:g} * sqrt({t.global_batch})",
        "constant": "as given",
    }[o.rule]
    return [
        f"data: {d.samples:,} images = {d.units_per_epoch:,} units of {d.unit_rows}{left}",
        f"batch: {t.global_batch} images = {d.units_per_step} units a step; "
        f"{d.negatives_per_anchor} negatives for each of {2 * t.global_batch} anchors",
        *micro,
        f"steps: {d.total_steps} = {d.epoch_at(d.total_steps):.2f} epochs of {d.steps_per_epoch:.1f} steps; "
        f"warm-up {d.warmup_steps}",
        f"learning rate: peak {d.peak_learning_rate:g} ({o.name}, {rule}), then {o.schedule}",
    ]
