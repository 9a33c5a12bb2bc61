from __future__ import annotations

import io
import resource
import struct
import time
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from simclr_ray.data.decode import REASONS, Limits, Rejected, decode
from simclr_ray.errors import ConfigError
from tests.unit.views.images import natural

# Pillow warns of odd metadata on its way to our answer.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

LIMITS = Limits()
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def encode(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes | None, limits: Limits = LIMITS) -> np.ndarray:
    out = decode(data, limits)
    assert not isinstance(out, Rejected), out
    assert out.dtype == np.uint8
    assert out.ndim == 3
    assert out.shape[2] == 3
    assert out.flags.writeable
    return out


def rejection(data: bytes | None, limits: Limits = LIMITS) -> Rejected:
    out = decode(data, limits)
    assert isinstance(out, Rejected)
    assert out.reason in REASONS
    assert 0 < len(out.detail) <= 160
    assert out.detail.isascii()
    assert out.detail.isprintable()
    return out


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims a size, with pixels that never come."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1 << 20) + b"IDAT"


@cache
def sample(kind: str) -> bytes:
    return encode(natural(40, 61), kind)


# --- good images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_allowed_formats_decode(kind: str):
    tolerance = {"JPEG": 12, "WEBP": 12, "GIF": 20}.get(kind, 0)
    out = pixels(sample(kind)).astype(int)
    assert out.shape == (40, 61, 3)
    assert np.abs(out - natural(40, 61)).mean() <= tolerance


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")]
)
def test_opaque_modes_become_rgb(mode: str, kind: str):
    image = Image.fromarray(natural(24, 24)).convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels(encode(image, kind)) - expected).mean() <= (12 if kind == "JPEG" else 0)


def test_16_bit_png_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    out = pixels(encode(ramp, "PNG"))
    assert out.mean() == pytest.approx(127.5, abs=0.5)
    assert np.abs(out[..., 0] - ramp / 257).max() <= 0.5
    assert (out[..., 0] == out[..., 2]).all()


def test_16_bit_tiff_is_scaled_in_either_byte_order():
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    for dtype in ("<u2", ">u2"):
        image = ramp.astype(dtype)
        mode = "I;16" if dtype == "<u2" else "I;16B"
        data = encode(Image.frombytes(mode, (16, 16), image.tobytes()), "TIFF")
        assert np.abs(pixels(data)[..., 1] - ramp / 257).max() <= 0.51


def test_float_tiff_is_scaled_from_zero_to_one_and_else_rejected():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert pixels(encode(ramp, "TIFF"))[..., 0].tolist() == np.rint(ramp * 255).astype(int).tolist()
    for other in (ramp * 1000, ramp - 0.5, np.full_like(ramp, np.nan)):
        assert rejection(encode(other, "TIFF")).reason == "mode"


def test_32_bit_integer_tiff_has_no_known_scale():
    assert rejection(encode(np.arange(256, dtype=np.int32).reshape(16, 16), "TIFF")).reason == "mode"


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_transparency_shows_the_background(kind: str, background: tuple[int, int, int]):
    image = np.zeros((8, 12, 4), np.uint8)
    image[..., 0] = 200  # hidden colour that must not be seen
    image[:, 4:8, 3] = 255
    image[:, 8:, 3] = 128
    out = pixels(encode(image, kind), Limits(background=background))
    assert (out[:, :4] == background).all()
    assert (out[:, 4:8] == (200, 0, 0)).all()
    mixed = (np.array([200, 0, 0]) * 128 + np.array(background) * 127) / 255
    assert np.abs(out[:, 8:] - mixed).max() <= 1


def test_transparent_palette_colour_key_and_grey_alpha_show_the_background():
    palette = Image.fromarray(natural(8, 8)).quantize(4)
    index = palette.getpixel((0, 0))
    assert (pixels(encode(palette, "PNG", transparency=index))[0, 0] == 255).all()
    assert (pixels(encode(palette, "GIF", transparency=index))[0, 0] == 255).all()
    key = np.full((4, 4, 3), 9, np.uint8)
    assert (pixels(encode(key, "PNG", transparency=(9, 9, 9))) == 255).all()
    grey_alpha = Image.merge("LA", [Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 0)])
    assert (pixels(encode(grey_alpha, "PNG")) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # white corner, top left
    stored = np.array(
        {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.swapaxes(0, 1),
            6: np.rot90(upright, 1),
            7: np.rot90(upright, 2).swapaxes(0, 1),
            8: np.rot90(upright, -1),
        }[orientation]
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": TiffImagePlugin.ImageFileDirectory_v2()} if kind == "TIFF" else {"exif": exif}
    if kind == "TIFF":
        options["tiffinfo"][0x0112] = orientation
    out = pixels(encode(stored, kind, **options))
    assert out.shape == upright.shape
    assert np.abs(out.astype(int) - upright).mean() < 5


def test_broken_exif_does_not_spoil_good_pixels():
    assert pixels(encode(natural(20, 20), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")).shape == (20, 20, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str):
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 3


def test_bits_flipped_in_a_jpeg_scan_are_a_documented_limit():
    data = bytearray(encode(natural(64, 64), "JPEG"))
    data[-200] ^= 0x10
    assert pixels(bytes(data)).shape == (64, 64, 3)


# --- rejected ------------------------------------------------------------------------------------------------------


def test_null_and_empty():
    assert rejection(None).reason == "null"
    assert rejection(b"").reason == "empty"


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>404</body></html>",
        b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
        b"\x1b[2J\n\"'<script>" * 3,
        b"\x00" * 100,
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
    ],
)
def test_what_is_no_image_shows_its_first_bytes_escaped(data: bytes):
    out = rejection(data)
    assert out.reason == "not_an_image"
    assert repr(data[:24]) in out.detail


@pytest.mark.parametrize(
    "data",
    [
        b"SIMPLE  =                    T",
        b"8BPS\x00\x01",
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        b"\x00\x00\x00\x20ftypheic",
    ],
)
def test_other_formats_are_refused_without_a_plugin(data: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a plugin was asked"))
    assert rejection(data + b"\x00" * 100).reason == "format"


def test_formats_that_pillow_knows_but_we_do_not_are_refused():
    for kind in ("PPM", "TGA", "JPEG2000", "ICO"):
        assert rejection(encode(natural(16, 16), kind)).reason in ("format", "not_an_image")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_rejected(kind: str, share: float):
    data = sample(kind)
    assert rejection(data[: int(len(data) * share)]).reason in ("truncated", "corrupt" if kind == "TIFF" else "")


def test_small_images_are_rejected_with_the_limit():
    for height, width in ((1, 1), (1, 5000), (5000, 1)):
        out = rejection(encode(np.zeros((height, width), np.uint8), "PNG"))
        assert out.reason == "too_small"
        assert "min_side = 2" in out.detail
    assert pixels(encode(np.zeros((1, 1), np.uint8), "PNG"), Limits(min_side=1)).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("width", "height"), [(11_000, 11_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (8000, 7000)]
)
def test_a_bomb_is_rejected_from_its_header(width: int, height: int):
    data = png_header(width, height) + b"\x00" * 350_000
    rejection(png_header(9000, 9000))  # imports are not what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    out = rejection(data)
    assert time.perf_counter() - start < 0.1  # 5 ms on a quiet machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 * 1024  # KiB
    assert out.reason == "too_large"


def test_a_bomb_is_rejected_where_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rejection(png_header(11_000, 11_000)).reason == "too_large"


def test_a_webp_that_claims_the_largest_size_costs_no_memory():
    side = (16383 - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x00" * 4 + side + side
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = rejection(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert out.reason in ("too_large", "corrupt", "truncated")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 * 1024


def test_limits_on_side_and_bytes():
    data = encode(natural(30, 50), "PNG")
    assert rejection(data, Limits(max_side=49)).reason == "too_large"
    assert rejection(data, Limits(max_bytes=100)).reason == "too_large"
    assert rejection(data, Limits(max_pixels=1499)).reason == "too_large"
    assert pixels(data, Limits(max_side=50, max_pixels=1500)).shape == (30, 50, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_pixels": 0},
        {"max_pixels": 10**9},
        {"min_side": 0},
        {"min_side": 9, "max_side": 8},
        {"max_bytes": 0},
        {"background": (0, 0, 256)},
    ],
)
def test_impossible_limits_are_errors_for_users(fields: dict):
    with pytest.raises(ConfigError):
        Limits(**fields)


# --- anything at all -----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
    st.booleans(),
)
def test_no_mutation_of_a_file_raises(kind: str, changes: list[tuple[float, int]], cut: float, keep_header: bool):
    data = bytearray(sample(kind))
    for place, value in changes:
        # Half of the mutations spare the signature, so that they reach the decoder.
        start = 16 if keep_header else 0
        data[start + int(place * (len(data) - start))] = value
    out = decode(bytes(data[: max(1, int(cut * len(data)))] if cut < 0.5 else data), LIMITS)
    assert isinstance(out, Rejected) or (out.ndim == 3 and out.shape[2] == 3)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([b"", *(sample(kind)[:12] for kind in FORMATS)]), st.binary(max_size=300))
def test_no_bytes_raise(head: bytes, tail: bytes):
    out = decode(head + tail, LIMITS)
    assert not isinstance(out, Rejected) or out.reason in REASONS
