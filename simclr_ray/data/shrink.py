"""Encode images anew, smaller: data that is decoded in every epoch is cheaper to decode at the size that is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from simclr_ray.data.decode import Decoded, Limits, Reduction, Rejected, decode_reduced, read_header
from simclr_ray.data.header import Header
from simclr_ray.errors import ConfigError

_FACTORS: tuple[Reduction, ...] = (8, 4, 2)


@dataclass(frozen=True)
class Shrink:
    """How images are encoded anew.

    Raises:
        ConfigError: a side or quality that makes no sense.
    """

    short_side: int
    """Pixels of the shorter side afterwards; images that are smaller are never enlarged."""
    quality: int = 90
    """Of the JPEG, 1 to 100."""

    def __post_init__(self) -> None:
        if self.short_side < 8:
            raise ConfigError("the shorter side of an image", got=self.short_side, expected="8 pixels or more")
        if not 1 <= self.quality <= 100:
            raise ConfigError("the quality of a JPEG", got=self.quality, expected="1 to 100")


class Stored(NamedTuple):
    """An image as it will be stored."""

    data: bytes
    encoded_anew: bool


def decode_about(data: bytes, header: Header, limits: Limits, side: int) -> Decoded | Rejected:
    """Decode an image, a JPEG at the smallest fraction of its size of which no side is below `side`."""
    shortest = min(header.height, header.width)
    reduction = next((factor for factor in _FACTORS if shortest >= factor * side), None)
    return decode_reduced(data, header, limits, reduction=reduction or 1)


def shrink(data: bytes | None, limits: Limits, how: Shrink) -> Stored | Rejected:
    """Encode an image anew as a baseline JPEG, upright, RGB, without metadata.

    Its shorter side is brought down to `how.short_side` by Pillow's bicubic filter, which averages over what it leaves
    out. JPEGs above twice that size are decoded at a fraction of it first, but never below twice the wanted side. An
    image that is such a JPEG already and not larger is kept byte for byte: encoding it again would only cost quality.
    """
    header = read_header(data, limits)
    if isinstance(header, Rejected):
        return header
    assert data is not None
    decoded = decode_about(data, header, limits, 2 * how.short_side)
    if isinstance(decoded, Rejected):
        return decoded
    small = min(header.height, header.width) <= how.short_side
    if small and header.kind == "JPEG" and header.reducible and header.orientation == 1:
        return Stored(data, encoded_anew=False)
    pixels = decoded.pixels
    if not small:
        scale = how.short_side / min(header.height, header.width)
        size = [max(how.short_side, round(side * scale)) for side in (header.width, header.height)]
        pixels = np.asarray(Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BICUBIC))
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=how.quality, colorsubsampling="420")
    return Stored(encoded, encoded_anew=True)
