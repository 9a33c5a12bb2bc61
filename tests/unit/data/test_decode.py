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
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from simclr_ray.data.decode import (
    REASONS,
    Decoded,
    Header,
    Limits,
    Rejected,
    decode,
    decode_reduced,
    read_header,
    reduced_size,
    reductions,
)
from simclr_ray.errors import ConfigError
from tests.unit.views.images import natural, png_of_16_bits

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


def header_of(data: bytes | None, limits: Limits = LIMITS) -> Header:
    out = read_header(data, limits)
    assert not isinstance(out, Rejected), out
    return out


def reduced(data: bytes, factor: int, **options) -> Decoded:
    out = decode_reduced(data, header_of(data), LIMITS, reduction=factor, **options)
    assert not isinstance(out, Rejected), out
    return out


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def damaged(image: np.ndarray) -> bytes:
    """A JPEG that libjpeg warns of and decodes."""
    data = encode(image, "JPEG")
    return data[:-2] + bytes(10) + data[-2:]


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


# --- good images ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("channels", "bound"), [(1, 0.5), (2, 1), (3, 1), (4, 1)])
def test_16_bit_png_of_colours_is_within_a_level(channels: int, bound: float):
    levels = np.random.default_rng(0).integers(0, 65536, (64, 48, channels), dtype=np.uint16)
    levels[:4] = np.array([0, 255, 256, 65535], np.uint16)[:, None, None]
    colours = 1 if channels < 3 else 3
    if channels in (2, 4):
        levels[..., -1] = 65535
    error = pixels(png_of_16_bits(levels)) - levels[..., :colours] / 257
    assert np.abs(error).max() <= bound
    assert abs(error.mean()) <= 0.02
    assert (error[[0, 3]] == 0).all()  # black and white


def test_16_bit_png_shows_the_background_where_it_is_transparent():
    levels = np.full((4, 6, 4), 20_000, np.uint16)
    levels[:, :3, 3] = 0
    levels[:, 3:, 3] = 65535
    out = pixels(png_of_16_bits(levels), Limits(background=(1, 2, 3)))
    assert (out[:, :3] == (1, 2, 3)).all()
    assert (out[:, 3:] == 20_000 >> 8).all()


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
    data = encode(stored, kind, **options)
    out = pixels(data)
    assert out.shape == upright.shape
    assert np.abs(out.astype(int) - upright).mean() < 5
    header = header_of(data)
    assert (header.height, header.width) == out.shape[:2]
    assert header.stored == stored.shape[:2]


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_in_xmp_is_applied_if_exif_has_none(kind: str):
    image = Image.fromarray(natural(16, 24))
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
        data = encode(image, kind, pnginfo=info)
    else:
        data = encode(image, kind, xmp=xmp)
    assert header_of(data).orientation == 6
    assert np.array_equal(pixels(data), by_pillow(data))
    exif = Image.Exif()
    exif[0x0112] = 8
    if kind != "PNG":
        both = encode(image, kind, xmp=xmp, exif=exif)
        assert header_of(both).orientation == 8
        assert np.array_equal(pixels(both), by_pillow(both))


def test_orientation_in_a_profile_of_imagemagick_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 3
    block = exif.tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    data = encode(natural(16, 24), "PNG", pnginfo=info)
    assert header_of(data).orientation == 3
    assert np.array_equal(pixels(data), by_pillow(data))


# --- header ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_a_header_is_read_without_a_decoder(kind: str, monkeypatch: pytest.MonkeyPatch):
    data = sample(kind)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("simplejpeg was asked"))
    header = header_of(data)
    assert (header.kind, header.height, header.width) == (kind, 40, 61)
    assert not header.animated


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "WEBP", {"exif": b"Exif\x00\x00II*\x00"}),
        ("P", "GIF", {}),
        ("P", "BMP", {}),
        ("1", "TIFF", {"compression": "group4"}),
        ("RGB", "TIFF", {"big_tiff": True}),
    ],
)
def test_headers_of_the_variants_of_a_format(mode: str, kind: str, options: dict):
    data = encode(Image.fromarray(natural(41, 62)).convert(mode), kind, **options)
    assert (header_of(data).height, header_of(data).width) == pixels(data).shape[:2] == (41, 62)


def test_bmp_stored_from_the_top_and_with_the_oldest_header():
    data = bytearray(encode(natural(20, 30), "BMP"))
    data[22:26] = struct.pack("<i", -20)
    assert np.array_equal(pixels(bytes(data)), natural(20, 30)[::-1])
    rows = natural(2, 4)[::-1, :, ::-1].tobytes()
    old = b"BM" + struct.pack("<IHHIIHHHH", 26 + len(rows), 0, 0, 26, 12, 4, 2, 1, 24) + rows
    assert np.array_equal(pixels(old), natural(2, 4))


def test_a_gif_frame_beyond_the_screen_widens_it():
    data = bytearray(sample("GIF"))
    data[6:10] = struct.pack("<HH", 10, 10)
    assert pixels(bytes(data)).shape == (40, 61, 3)


def test_a_jpeg_header_takes_microseconds():
    data = encode(natural(600, 800), "JPEG")
    header_of(data)
    start = time.perf_counter()
    for _ in range(200):
        read_header(data, LIMITS)
    assert (time.perf_counter() - start) / 200 < 200e-6  # 4 us on a quiet machine


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_told_and_can_be_rejected(kind: str):
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert header_of(data).animated
    out = rejection(data, Limits(animated="reject"))
    assert out.reason == "animated"
    assert kind in out.detail
    still = encode(frames[0], kind)
    assert not header_of(still).animated
    assert pixels(still, Limits(animated="reject")).shape == (10, 12, 3)


def test_pages_and_the_pictures_of_a_camera_are_no_animation():
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "blue")]
    for kind in ("TIFF", "MPO"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert pixels(data, Limits(animated="reject")).shape == (10, 12, 3)


def test_reasons_are_stored_by_number():
    assert REASONS == (
        "null",
        "empty",
        "not_an_image",
        "format",
        "truncated",
        "too_large",
        "too_small",
        "mode",
        "corrupt",
        "animated",
        "shard_missing",
        "shard_unreadable",
    )


# --- JPEG through simplejpeg ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (2, 3), (7, 7), (8, 1000)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:4:4"},
        {"quality": 30, "optimize": True},
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"keep_rgb": True},
    ],
    ids=str,
)
def test_usual_jpegs_have_pillows_pixels(options: dict, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    data = encode(natural(*size), "JPEG", **options)
    expected = by_pillow(data)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
    assert np.array_equal(pixels(data), expected)


def test_grey_jpegs_have_pillows_pixels():
    data = encode(Image.fromarray(natural(37, 53)).convert("L"), "JPEG")
    assert header_of(data).plain
    assert np.array_equal(pixels(data), by_pillow(data))


def test_cmyk_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("simplejpeg was asked"))
    data = encode(Image.fromarray(natural(37, 53)).convert("CMYK"), "JPEG")
    assert np.array_equal(pixels(data), by_pillow(data))


def test_ycck_shows_the_picture_that_was_stored():
    """As Adobe's programs write it: inverted CMYK, whose first three are stored as luma and chroma."""
    picture = natural(40, 56)
    ycc = np.asarray(Image.fromarray(255 - picture).convert("YCbCr"))
    no_black = np.zeros((*picture.shape[:2], 1), np.uint8)
    data = bytearray(encode(Image.fromarray(np.dstack([255 - ycc, no_black]), "CMYK"), "JPEG", quality=100))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0, "Pillow stores CMYK as it is"
    data[transform] = 2
    out = pixels(bytes(data))
    assert np.array_equal(out, by_pillow(bytes(data)))
    assert np.abs(out.astype(int) - picture).mean() < 2


def test_a_damaged_jpeg_that_pillow_decodes_has_pillows_pixels():
    data = damaged(natural(64, 64))
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(data)
    assert np.array_equal(pixels(data), by_pillow(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_anywhere_is_truncated(mode: str, progressive: bool):
    data = encode(Image.fromarray(natural(24, 24)).convert(mode), "JPEG", progressive=progressive)
    for length in range(3, len(data) - 2):
        out = decode(data[:length], LIMITS)
        # The last byte of a scan may be mere padding: then nothing is missing but the end marker.
        assert length == len(data) - 3 or isinstance(out, Rejected), length
        assert not isinstance(out, Rejected) or out.reason == "truncated", (length, out)


def test_a_header_of_other_bytes_cannot_overflow():
    data = encode(natural(64, 64), "JPEG")
    for height, width in ((8, 8), (64, 63), (63, 64), (128, 128)):
        other = header_of(data)._replace(height=height, width=width)
        out = decode_reduced(data, other, LIMITS)
        assert isinstance(out, Rejected)
        assert out.reason == "corrupt"


# --- buffers and reduction ------------------------------------------------------------------------------------------


def test_a_buffer_is_used_where_it_fits():
    first, second = (encode(natural(40, 61, seed), "JPEG") for seed in (1, 2))
    buffer = np.zeros(40 * 61 * 3 + 5, np.uint8)
    out = reduced(first, 1, buffer=buffer).pixels
    assert np.shares_memory(out, buffer)
    assert np.array_equal(out, pixels(first))
    assert np.array_equal(reduced(second, 1, buffer=buffer).pixels, pixels(second))
    assert np.array_equal(out, pixels(second))
    assert not buffer[-5:].any()
    for data, room in ((first, buffer[:100]), (sample("PNG"), buffer)):
        other = reduced(data, 1, buffer=room).pixels
        assert not np.shares_memory(other, buffer)
        assert np.array_equal(other, pixels(data))


@pytest.mark.parametrize(
    ("sides", "size", "factor"),
    [
        ([(224, 224), (500, 500)], 224, 1),
        ([(447, 900), (900, 900)], 224, 1),
        ([(448, 900), (900, 448)], 224, 2),
        ([(895, 900), (1200, 1200)], 224, 2),
        ([(896, 896), (5000, 896)], 224, 4),
        ([(1792, 9000), (9000, 9000)], 224, 8),
        ([(90_000, 90_000)], 224, 8),
        ([(10, 10)], 224, 1),
    ],
)
def test_reduction_keeps_every_crop_at_full_resolution(sides: list[tuple[int, int]], size: int, factor: int):
    boxes = np.array([(3, 5, height, width) for height, width in sides], dtype=np.int32)
    assert reductions(boxes[None], size).tolist() == [factor]


@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=4), st.integers(1, 512))
def test_reduction_is_the_largest_that_loses_nothing(sides: list[tuple[int, int]], size: int):
    (factor,) = reductions(np.array([[(0, 0, *side) for side in sides]]), size)
    shortest = min(min(side) for side in sides)
    assert factor == 1 or shortest / factor >= size
    assert factor == 8 or shortest / (2 * factor) < size


def test_reductions_are_of_each_image_by_itself():
    boxes = np.array([[(0, 0, 64, 99), (1, 1, 500, 64)], [(0, 0, 31, 99), (0, 0, 99, 99)], [(9, 9, 256, 300)] * 2])
    assert reductions(boxes, 32).tolist() == [2, 1, 8]
    assert reductions(boxes[:0], 32).tolist() == []


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(128, 192), (131, 197), (9, 300)])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_the_size_that_a_decode_will_have_is_known_before(factor: int, size: tuple[int, int], orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(natural(*size), "JPEG", exif=exif)
    out = reduced(data, factor)
    assert (out.reduction, *out.pixels.shape[:2]) == reduced_size(header_of(data), factor)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(128, 192), (131, 197)])
def test_a_reduced_jpeg_is_the_full_one_in_small(factor: int, size: tuple[int, int]):
    data = encode(natural(*size), "JPEG", quality=95)
    out = reduced(data, factor)
    assert out.reduction == factor
    assert out.pixels.shape == (-(-size[0] // factor), -(-size[1] // factor), 3)
    height, width = (side // factor for side in size)  # whole blocks
    full = pixels(data)[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    assert np.abs(out.pixels[:height, :width] - full.mean((1, 3))).mean() < 2


def test_a_view_through_a_reduced_decode_is_nearly_the_same():
    data = encode(natural(512, 768), "JPEG", quality=90)
    top, left, height, width = box = (37, 101, 225, 331)
    (factor,) = reductions(np.array([[box]]), 112).tolist()
    out = reduced(data, factor)
    assert out.reduction == 2

    def view(image: np.ndarray, factor: float) -> np.ndarray:
        corners = (left / factor, top / factor, (left + width) / factor, (top + height) / factor)
        resized = Image.fromarray(image).resize((112, 112), Image.Resampling.BILINEAR, box=corners)
        return np.asarray(resized).astype(int)

    difference = np.abs(view(out.pixels, 2) - view(pixels(data), 1))
    shifted = np.abs(view(pixels(data)[:, 1:], 1) - view(pixels(data), 1))
    assert difference.mean() < 1.5
    assert difference.mean() < shifted.mean()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_turned_or_not_reduced(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(natural(128, 192), "JPEG", exif=exif)
    out = reduced(data, 4)
    assert out.reduction == 4
    full = by_pillow(data)
    height, width = full.shape[0] // 4, full.shape[1] // 4
    assert out.pixels.shape == (height, width, 3)
    assert np.abs(out.pixels - full.reshape(height, 4, width, 4, 3).mean((1, 3))).mean() < 3
    odd = encode(natural(130, 192), "JPEG", exif=exif)
    assert reduced(odd, 4).reduction == (4 if orientation == 1 else 1)


def test_what_cannot_be_reduced_says_so():
    image = Image.fromarray(natural(64, 96))
    for data in (
        encode(image, "PNG"),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("CMYK"), "JPEG"),
        damaged(natural(64, 96)),
    ):
        out = reduced(data, 2)
        assert out.reduction == 1
        assert np.array_equal(out.pixels, pixels(data))
    assert reduced(encode(natural(3, 3), "JPEG"), 2).reduction == 1


# --- rejected -------------------------------------------------------------------------------------------------------


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
        {"animated": "all"},
    ],
)
def test_impossible_limits_are_errors_for_users(fields: dict):
    with pytest.raises(ConfigError):
        Limits(**fields)


# --- files of nothing but parts, which would keep a decoder busy ----------------------------------------------------


@cache
def bombs() -> dict[str, bytes]:
    jpeg, png, gif = (encode(natural(16, 16), kind) for kind in ("JPEG", "PNG", "GIF"))
    progressive = encode(natural(16, 16), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xc4") : -2]  # the last one, with its table
    chunk = struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    run_lengths = struct.pack("<IHHI", 0, 0, 0, 1078) + struct.pack("<IiiHHIIiiII", 40, 5000, 5000, 1, 8, 1, *[0] * 5)
    after_table = 13 + (3 << (gif[10] & 7) + 1)
    sides = struct.pack("<HHLHH", 256, 3, 1, 64, 0) + struct.pack("<HHLHH", 257, 3, 1, 64, 0)
    strips = sides + struct.pack("<HHLL", 273, 4, 10**6, 200)
    entries = sides * 30_000
    return {
        "scans": progressive[:-2] + scan * 60 + progressive[-2:],
        "segments": jpeg[:2] + b"\xff\xfe\x00\x02" * 60_000 + jpeg[2:],
        "EXIF": jpeg[:2] + (b"\xff\xe1\x10\x08Exif\x00\x00" + bytes(4096)) * 200 + jpeg[2:],
        "fill": jpeg[:2] + b"\xff" * 10**6 + jpeg[2:],
        "junk": jpeg[:20] + bytes(10**6) + jpeg[20:],
        "chunks": png[:33] + chunk * 60_000 + png[33:],
        "extensions": gif[:after_table] + b"!\xfe\x00" * 60_000 + gif[after_table:],
        "blocks": gif[:after_table] + (b"!\xfe" + b"\x01a" * 1000 + b"\x00") * 60 + gif[after_table:],
        "run lengths": b"BM" + run_lengths + bytes(1024) + b"\x01\x01" * 1000,
        "WebP chunks": b"RIFF\x00\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00"
        + bytes([0] * 4 + [9, 0, 0] * 2 + [0] * 8 * 60_000),
        "strips": b"II*\x00" + struct.pack("<LH", 8, 3) + strips,
        "entries": b"II*\x00" + struct.pack("<LH", 8, 60_000) + entries,
        "big entries": b"II+\x00\x08\x00\x00\x00" + struct.pack("<QQ", 16, 60_000) + bytes(20 * 60_000),
    }


@pytest.mark.parametrize("name", list(bombs()))
def test_files_of_nothing_but_parts_are_rejected_at_once(name: str):
    data = bombs()[name]
    start = time.perf_counter()
    out = rejection(data)
    assert time.perf_counter() - start < 0.5  # 30 ms on a quiet machine
    assert out.reason == "too_large"
    assert "more than" in out.detail
    assert "max_" not in out.detail


# --- anything at all ------------------------------------------------------------------------------------------------


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
