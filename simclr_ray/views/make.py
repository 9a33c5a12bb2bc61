"""Views by the fastest means at hand: the C kernel where it was built, else OpenCV where it is there, else torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from simclr_ray.views import apply, native, opencv
from simclr_ray.views.apply import Image, Source
from simclr_ray.views.draw import Draws
from simclr_ray.views.policy import Policy

Maker = Literal["kernel", "opencv", "torch"]
"""They differ by a level of 255 in a few values in a thousand; `native.py` and `opencv.py` say where."""


def maker() -> Maker:
    """Who makes views on this machine."""
    if native.available():
        return "kernel"
    return "opencv" if opencv.available() else "torch"


def how_views_are_made(where: str) -> str:
    """A sentence for the log, as this machine sees it."""
    if where == "cpu":
        return f"finished in the stream by {_named()}"
    return f"coloured in the train workers, cropped in the stream by {_named()}"


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


def _named() -> str:
    """Who makes views here, and what keeps the faster ones from it."""
    if maker() == "kernel":
        return "the C kernel"
    if maker() == "opencv":
        return f"OpenCV ({native.why_not()})"
    return f"torch, slowly ({native.why_not()}; {opencv.why_not()})"
