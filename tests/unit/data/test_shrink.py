"""Encoding anew: never larger, upright, baseline, and close to the picture that it was."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from simclr_ray.data.decode import Limits, Rejected, decode, read_header
from simclr_ray.data.shrink import Shrink, Stored, shrink
from simclr_ray.errors import ConfigError
from tests.unit.views.images import natural

LIMITS = Limits()


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def shrunk(data: bytes, short_side: int, quality: int = 90) -> Stored:
    made = shrink(data, LIMITS, Shrink(short_side, quality))
    assert isinstance(made, Stored)
    return made


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("height", "width", "size"), [(600, 800, (64, 85)), (801, 403, (127, 64)), (65, 64, (65, 64))])
def test_the_shorter_side_is_brought_down(kind: str, height: int, width: int, size: tuple[int, int]) -> None:
    made = shrunk(encoded(natural(height, width), kind), 64)
    header = read_header(made.data, LIMITS)
    assert not isinstance(header, Rejected)
    assert (header.kind, header.height, header.width) == ("JPEG", *size)
    assert header.reducible, "baseline, of one scan"


@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (1200, 1600)], ids=["decoded whole", "decoded at a fraction"]
)
def test_the_picture_stays_what_it_was(height: int, width: int) -> None:
    pixels = natural(height, width)
    made = decode(shrunk(encoded(pixels, quality=95), 128, quality=95).data, LIMITS)
    assert not isinstance(made, Rejected)
    twin = Image.fromarray(pixels).resize((made.shape[1], made.shape[0]), Image.Resampling.BICUBIC)
    assert np.abs(made.astype(int) - np.asarray(twin).astype(int)).mean() < 2.0


def test_small_baseline_jpegs_keep_their_bytes() -> None:
    data = encoded(natural(60, 80), quality=70)
    assert shrunk(data, 64) == Stored(data, encoded_anew=False)


def test_nothing_is_enlarged() -> None:
    made = shrunk(encoded(natural(40, 30), "PNG"), 64)
    header = read_header(made.data, LIMITS)
    assert not isinstance(header, Rejected)
    assert (header.height, header.width) == (40, 30)
    assert made.encoded_anew


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_applied_and_gone(orientation: int) -> None:
    pixels = natural(90, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = shrunk(encoded(pixels, exif=exif, quality=95), 64, quality=95)
    header = read_header(made.data, LIMITS)
    assert not isinstance(header, Rejected)
    assert header.orientation == 1
    upright = decode(encoded(pixels, exif=exif, quality=95), LIMITS)
    again = decode(made.data, LIMITS)
    assert not isinstance(upright, Rejected)
    assert not isinstance(again, Rejected)
    assert again.shape == upright.shape
    assert np.abs(again.astype(int) - upright.astype(int)).mean() < 2.0


def test_progressive_ones_become_baseline() -> None:
    made = shrunk(encoded(natural(60, 80), progressive=True), 64)
    assert made.encoded_anew
    header = read_header(made.data, LIMITS)
    assert not isinstance(header, Rejected)
    assert header.scans == 1


def test_what_does_not_decode_is_rejected() -> None:
    for data, reason in ((None, "null"), (b"", "empty"), (encoded(natural(60, 80))[:-200], "truncated")):
        made = shrink(data, LIMITS, Shrink(64))
        assert isinstance(made, Rejected)
        assert made.reason == reason


@pytest.mark.parametrize(
    "setting", [{"short_side": 0}, {"short_side": 64, "quality": 0}, {"short_side": 64, "quality": 101}]
)
def test_settings_without_sense_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Shrink(**setting)
