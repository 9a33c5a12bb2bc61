"""What the encoder is going to see: images of the data set, their first two views, and the numbers drawn for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import ConfigSource, load_config, use_storage
from simclr_ray.data.decode import REASONS, Rejected, decode
from simclr_ray.data.manifest import read_manifest
from simclr_ray.data.plan import Plan, UnitTable
from simclr_ray.data.units import plan_tasks, read_planned
from simclr_ray.errors import ConfigError
from simclr_ray.evaluate.pictures import Image, views_sheet
from simclr_ray.train.derive import limits_of, policy_of
from simclr_ray.views.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws
from simclr_ray.views.policy import Policy
from simclr_ray.views.stage import Columns, ViewStage, draws_at

_MOST = 64


def preview(
    config: ConfigSource = None, overrides: Sequence[str] = (), *, output: str = "views.png", images: int = 12
) -> list[str]:
    """Draw a sheet of images beside the two views of each that the first epoch trains on; no Ray cluster is started.

    Args:
        config: As for `pretrain`; `data.train`, `views`, `run.seed` and limits of `data` count.
        overrides: On top.
        output: PNG to write.
        images: How many, 1 to 64: the first of the run's order.

    Returns:
        The drawn parameters in words, some lines an image.

    Raises:
        ConfigError: no data set is named, or a number out of range.
        DataError: the data set cannot be read.
    """
    settings = load_config(config, overrides)
    use_storage(settings)
    if not settings.data.train:
        raise ConfigError("data.train must be set", fix="add --set data.train=FOLDER")
    if not 1 <= images <= _MOST:
        raise ConfigError("a sheet of so many images cannot be drawn", got=images, expected=f"1 to {_MOST}")
    seen = first_views(settings, images)
    title = f"{settings.views.preset}, flavour {settings.views.flavour}"
    views_sheet([one.image for one in seen], np.stack([one.views for one in seen]), output, title=title)
    return [line for one in seen for line in one.words]


class Seen(NamedTuple):
    """An image as the first epoch trains on it."""

    image: Image
    """Decoded, (H, W, 3) uint8."""
    views: Image
    """Its two views, (2, S, S, 3) uint8."""
    words: tuple[str, ...]
    """What was drawn: a line for the image and one for each view."""


def first_views(settings: Config, images: int) -> list[Seen]:
    """The first images of a run's order with the two views that training makes of them; fewer where there are fewer.

    Raises:
        ConfigError: the data set fills no unit.
        DataError: it cannot be read.
    """
    manifest = read_manifest(storage.normalise(str(settings.data.train)))
    table = UnitTable(manifest)
    if not table.num_units:
        raise ConfigError("the data set fills no unit", where="data.train", got=f"{manifest.rows} images")
    policy = policy_of(settings.views)
    limits = limits_of(settings.data)
    stage = ViewStage(policy, settings.run.seed, limits, scaled_decode=settings.views.scaled_decode)
    seen: list[Seen] = []
    units = min(table.num_units, -(-images // manifest.unit_rows))
    for task in plan_tasks(manifest, Plan(table, settings.run.seed), 0, units, units_per_task=1, limits=limits):
        rows = read_planned(task, task.start)
        unit: Columns = {name: rows[name].to_numpy(zero_copy_only=False) for name in rows.column_names}
        out = stage.columns(unit)
        encoded = dict(zip(unit["sample_id"].tolist(), unit["image"].tolist(), strict=True))
        wanted = slice(0, images - len(seen))
        for place, sample_id in enumerate(out["sample_id"][wanted].tolist()):
            image = decode(encoded[sample_id], limits)
            assert not isinstance(image, Rejected)
            address = {name: out[name][place : place + 1].astype(np.int64) for name in ("epoch", "use")}
            draws = draws_at(
                policy, seed=settings.run.seed, sample_ids=np.array([sample_id]),
                sizes=np.array([image.shape[:2]]), **address,
            )  # fmt: skip
            words = describe(sample_id, image.shape[:2], draws, policy, instead_of=_rejected_at(place, out))
            seen.append(Seen(image, out["views"][place].astype(np.uint8), tuple(words)))
    return seen


def _rejected_at(place: int, unit: Columns) -> str | None:
    """The image that would have stood at a place of a finished unit, and why it does not."""
    rejected = int(unit["rejected_id"][place])
    return None if rejected < 0 else f"image {rejected}, rejected as {REASONS[int(unit['reason'][place])]}"


def describe(
    sample_id: int, size: tuple[int, ...], draws: Draws, policy: Policy, *, instead_of: str | None = None
) -> Iterator[str]:
    """The draws (1, 2) of one image, a line for it and a line for each view.

    Args:
        sample_id: Of the image.
        size: Its height and width.
        draws: (1, 2), of one use of it.
        policy: They were drawn from.
        instead_of: What this use of it stands in for, in words.
    """
    yield f"image {sample_id}: {size[1]} x {size[0]} pixels" + (f", instead of {instead_of}" if instead_of else "")
    for view, name in enumerate("ab"):
        drawn = draws[0:1, view : view + 1].flatten()[0]
        yield f"  view {name}: " + "; ".join(_words(drawn, size, policy))


def _words(drawn: Draws, size: tuple[int, ...], policy: Policy) -> Iterator[str]:
    share = drawn.height * drawn.width / (size[0] * size[1])
    flipped = ", mirrored" if drawn.flip else ""
    yield f"crop {drawn.width} x {drawn.height} at {drawn.left}, {drawn.top} ({share:.0%} of the area){flipped}"
    if drawn.jitter:
        words = {
            BRIGHTNESS: (policy.brightness, f"brightness x {drawn.brightness:.2f}"),
            CONTRAST: (policy.contrast, f"contrast x {drawn.contrast:.2f}"),
            SATURATION: (policy.saturation, f"saturation x {drawn.saturation:.2f}"),
            HUE: (policy.hue, f"hue {360 * drawn.hue:+.0f} degrees"),
        }
        changes = [words[number][1] for number in drawn.order.tolist() if words[number][0] > 0]
        if changes:
            yield ", then ".join(changes)
    if drawn.grayscale:
        yield "gray"
    if drawn.blur:
        yield f"blur of {drawn.sigma:.2f} pixels"
    if drawn.solarize:
        yield "solarized"
