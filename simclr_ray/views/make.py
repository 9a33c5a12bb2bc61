"""Views by the fastest means at hand: the C kernel where it was built, its twin in torch otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from simclr_ray.views import apply, native
from simclr_ray.views.apply import Image
from simclr_ray.views.draw import Draws
from simclr_ray.views.policy import Policy


def how_views_are_made(where: str) -> str:
    """A sentence for the log, as this machine sees it."""
    by = "the C kernel" if native.available() else f"torch here, for {native.why_not()}"
    if where == "cpu":
        return f"finished by {by} in the stream"
    return f"cropped by {by} in the stream, colours in the train workers"


def two_views(images: Sequence[Image], draws: Draws, policy: Policy) -> Image:
    """Finished views, as `apply.two_views` makes them."""
    if native.available():
        return native.two_views(images, draws, policy)
    return apply.two_views(images, draws, policy)


def crop(images: Sequence[Image], draws: Draws, policy: Policy) -> Image:
    """Crops of undistorted colours, as `apply.crop` makes them."""
    if native.available():
        return native.crop(images, draws, policy)
    return apply.crop(images, draws, policy)
