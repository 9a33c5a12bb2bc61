"""Views by the fastest means at hand: the C kernel where it was built, else OpenCV where it is there, else torch."""

from __future__ import annotations

from collections.abc import Sequence

from simclr_ray.views import apply, native, opencv
from simclr_ray.views.apply import Image, Source
from simclr_ray.views.draw import Draws
from simclr_ray.views.policy import Policy


def how_views_are_made(where: str) -> str:
    """A sentence for the log, as this machine sees it."""
    if where == "cpu":
        return f"finished in the stream by {_maker()}"
    return f"coloured in the train workers, cropped in the stream by {_maker()}"


def two_views(images: Sequence[Source], draws: Draws, policy: Policy) -> Image:
    """Finished views, as `apply.two_views` makes them."""
    if native.available():
        return native.two_views(images, draws, policy)
    if opencv.available():
        return opencv.two_views(images, draws, policy)
    return apply.two_views(images, draws, policy)


def crop(images: Sequence[Source], draws: Draws, policy: Policy) -> Image:
    """Crops of undistorted colours, as `apply.crop` makes them."""
    if native.available():
        return native.crop(images, draws, policy)
    if opencv.available():
        return opencv.crop(images, draws, policy)
    return apply.crop(images, draws, policy)


def _maker() -> str:
    """Who makes views here, and what keeps the faster ones from it."""
    if native.available():
        return "the C kernel"
    if opencv.available():
        return f"OpenCV ({native.why_not()})"
    return f"torch, slowly ({native.why_not()}; {opencv.why_not()})"
