"""Bytes of anyone's image files to RGB pixels, or a reason why not.

Bad input is a value here, never an exception: the stream counts and lists `Rejected`, and training goes on. The
bytes are hostile until shown otherwise. What they are is told from their first bytes, only the six allowed formats
ever reach a decoder, and the header's size is checked before a pixel is decoded. The caller bounds the memory of
the process for the rest.

In two steps where crops are drawn between them: `read_header` tells the upright size in microseconds, `reductions`
how far the crops let images be reduced, and `decode_reduced` decodes one. `decode` does both steps at once.

The usual JPEGs are decoded by libjpeg-turbo through simplejpeg, all else by Pillow. Their pixels are the same, bit by
bit. Pillow also has the last word on damaged JPEGs: simplejpeg refuses at the first warning.

Accepted knowingly: damage that the format cannot detect (bits flipped inside a JPEG's scan), and the first frame
of an animation (`Limits.animated` can refuse it).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from simclr_ray.data.header import Excessive, Header, parse
from simclr_ray.errors import ConfigError

__all__ = [
    "REASONS",
    "Decoded",
    "Header",
    "Limits",
    "Pixels",
    "Reason",
    "Reduction",
    "Rejected",
    "decode",
    "decode_reduced",
    "read_header",
    "reduced_size",
    "reductions",
]

# Reasons are stored by their number: new ones go to the end.
Reason = Literal[
    "null", "empty", "not_an_image", "format", "truncated", "too_large", "too_small", "mode", "corrupt", "animated",
    "shard_missing", "shard_unreadable",
]  # fmt: skip
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)
Pixels = npt.NDArray[np.uint8]
Reduction = Literal[1, 2, 4, 8]

# Pillow refuses more than twice this by itself, whatever the caller allows.
_PILLOW_MAX_PIXELS: Final = 2 * 89_478_485
_DETAIL_LENGTH: Final = 160
_OPAQUE_MODES: Final = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_ALPHA_MODES: Final = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_MODES_16_BIT: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})

# The formats decoded, by their first bytes; RIFF and RIFX are told apart from WEBP below.
_SIGNATURES: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)
# Images that are refused: known only in order to say so. No code of theirs is ever run.
_REFUSED: Final = (
    (b"SIMPLE  =", "FITS"),
    (b"8BPS", "PSD"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"icns", "ICNS"),
    (b"gimp xcf", "XCF"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
)


@dataclass(frozen=True)
class Limits:
    """What is decoded at all. Sizes are read from the header, before any decoding.

    Raises:
        ConfigError: limits that contradict each other, or exceed what Pillow will open.
    """

    max_pixels: int = 50_000_000
    """Most pixels of an image. Decoding takes 3 bytes of memory for each of a usual JPEG's, at worst 20."""
    max_side: int = 20_000
    """Longest side, in pixels."""
    min_side: int = 2
    """Shortest side, in pixels."""
    max_bytes: int = 100_000_000
    """Longest encoded image."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green and blue that show through transparent pixels."""
    animated: Literal["first_frame", "reject"] = "first_frame"
    """What a GIF, WebP or PNG of several frames gives."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= _PILLOW_MAX_PIXELS:
            expected = f"1 to {_PILLOW_MAX_PIXELS}, Pillow's own limit"
            raise ConfigError("the most pixels of an image", got=self.max_pixels, expected=expected)
        if not 1 <= self.min_side <= self.max_side:
            got = f"{self.min_side} and {self.max_side}"
            raise ConfigError("shortest and longest side of an image", got=got, expected="1 <= shortest <= longest")
        if self.max_bytes < 1:
            raise ConfigError("the most bytes of an image", got=self.max_bytes, expected="1 or more")
        if len(self.background) != 3 or not all(0 <= level <= 255 for level in self.background):
            raise ConfigError("background colour", got=self.background, expected="three levels from 0 to 255")
        if self.animated not in ("first_frame", "reject"):
            raise ConfigError("animated images", got=self.animated, expected="first_frame or reject")


@dataclass(frozen=True)
class Rejected:
    """Why an image was not decoded."""

    reason: Reason
    detail: str
    """A short line of printable ASCII for the reader; what came from the bytes is escaped."""


class Decoded(NamedTuple):
    """An upright image, perhaps smaller than its header said."""

    pixels: Pixels
    """(H, W, 3) uint8, writable."""
    reduction: Reduction
    """By what the sides were divided, rounded up: a box of the image is this many times smaller here."""


class _Refusal(Exception):
    """Carries a `Rejected` out of the steps below."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.rejected = Rejected(reason, detail[:_DETAIL_LENGTH])


def decode(data: bytes | None, limits: Limits) -> Pixels | Rejected:
    """Decode one image. Never raises, whatever the bytes are.

    Args:
        data: The encoded image: JPEG, PNG, WebP, GIF, BMP or TIFF. None is a null of the table it came from.
        limits: What to refuse.

    Returns:
        (H, W, 3) uint8, writable: upright (EXIF), the first frame, transparency composited on the background, 16
        bits scaled to 8 (rounded where the image is grey; colours and transparency are the high byte, for Pillow reads
        no more of them, which is less than a level off); or the reason why not.
    """
    header = read_header(data, limits)
    if isinstance(header, Rejected):
        return header
    assert data is not None
    decoded = decode_reduced(data, header, limits)
    return decoded if isinstance(decoded, Rejected) else decoded.pixels


def read_header(data: bytes | None, limits: Limits) -> Header | Rejected:
    """Tell an image's upright size without decoding it. Never raises, whatever the bytes are.

    A file that passes may still be rejected by its decoder.
    """
    if data is None:
        return Rejected("null", "no bytes: the value is null")
    if not data:
        return Rejected("empty", "0 bytes")
    kind = ""
    try:
        kind = _identify(data, limits)
        header = parse(kind, data)
        _check_size(header, limits)
        if header.animated and limits.animated == "reject":
            raise _Refusal("animated", f"{kind} of several frames")
    except _Refusal as refusal:
        return refusal.rejected
    except Excessive as error:
        return _rejected("too_large", error)
    except Exception as error:  # mostly BadHeader; the bytes are hostile here too
        return _rejected("truncated" if _is_cut(kind, data, error) else "corrupt", error)
    return header


def reductions(boxes: npt.NDArray[np.integer[Any]], size: int) -> npt.NDArray[np.int64]:
    """By how much images can be reduced so that no crop of them has to be enlarged for it.

    Args:
        boxes: (n, views, 4): top, left, height and width of each image's crops, in pixels of the upright image.
        size: Side of the views.

    Returns:
        (n,) of 1, 2, 4 or 8: the largest factor after which every crop of the image still has `size` pixels on both
        sides.
    """
    shortest = boxes[..., 2:].min(axis=(1, 2), initial=np.iinfo(np.int32).max)
    power = np.searchsorted(size * np.array([2, 4, 8]), shortest, side="right")
    factors: npt.NDArray[np.int64] = np.left_shift(1, power, dtype=np.int64)
    return factors


def reduced_size(header: Header, reduction: Reduction) -> tuple[Reduction, int, int]:
    """The factor that is applied where `reduction` is asked for, and the height and width that the image then has."""
    factor = _possible(header, reduction)
    return factor, -(-header.height // factor), -(-header.width // factor)


def decode_reduced(
    data: bytes,
    header: Header,
    limits: Limits,
    *,
    reduction: Reduction = 1,
    buffer: Pixels | None = None,
) -> Decoded | Rejected:
    """Decode one image whose header has been read. Never raises, whatever the bytes are.

    A reduction saves time by being an approximation: each block of 8 x 8 is transformed back to 4 x 4, 2 x 2 or 1
    pixel. A box of the image becomes the box divided by the reduction, fractions kept: rounded to whole pixels it
    would be off by several times as much as below. Measured with `reductions` on crops of 12 photographs of 1024 x 768
    pixels and 6 of 2048 x 1536, quality 90, one core, against the full decode (views of 224 pixels, antialiased
    bilinear, in levels of 255; "shift" is what a crop one pixel to the side differs by; both crops are by the C
    kernel):

        image   factor   share of images   mean difference   worst view   shift   decoding       both crops
        1024       2          47 %               0.38            0.9        1.3   1.9 -> 1.4 ms   0.8 -> 0.4 ms
        2048       2          38 %               0.19            0.3        0.6   6.9 -> 5.0 ms   1.9 -> 0.7 ms
        2048       4          59 %               0.40            0.6        0.6   6.8 -> 4.2 ms   2.7 -> 0.5 ms

    At 500 pixels no pair of crops allows a reduction to 224. Views that are made without antialiasing differ by 1.2 to
    3.1, as a reduced image has none of what they alias.

    Args:
        data: The encoded image.
        header: What `read_header` said of these very bytes.
        limits: What to refuse.
        reduction: Wanted factor. Only JPEGs of one scan follow it, and of them not those that EXIF turns or mirrors
            while a side is no multiple of it, whose blocks would not start at the upright image's edge.
        buffer: One-dimensional memory to decode into, writable. It is used where the image fits and the decoder can;
            `Decoded.pixels` then lies in it, until the next call.

    Returns:
        As `decode`, with the factor that was applied.
    """
    assert buffer is None or (buffer.ndim == 1 and buffer.dtype == np.uint8), buffer
    factor = _possible(header, reduction)
    try:
        if header.plain:
            pixels = _by_simplejpeg(data, header, factor, buffer)
            if pixels is not None:
                return Decoded(_turned(pixels, header.orientation), factor)
        return Decoded(_by_pillow(data, header, limits), 1)
    except _Refusal as refusal:
        return refusal.rejected
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return _rejected("too_large", error)
    except MemoryError:
        # Linux hands out memory it does not have, so this is a file that asks for absurd amounts behind its header.
        return Rejected("too_large", "asks for more memory than there is")
    except Exception as error:  # a trust boundary: decoders fail on hostile bytes in ways that nobody can list
        return _rejected("truncated" if _is_cut(header.kind, data, error) else "corrupt", error)


def _possible(header: Header, wanted: Reduction) -> Reduction:
    """The factor that is applied where `wanted` is asked for."""
    # A side of a few pixels would be the same at several scales, and simplejpeg goes by sides.
    if wanted == 1 or not header.reducible or min(header.stored) < 8 * wanted:
        return 1
    if header.orientation != 1 and any(side % wanted for side in header.stored):
        return 1
    return wanted


def _by_simplejpeg(data: bytes, header: Header, factor: Reduction, buffer: Pixels | None) -> Pixels | None:
    """The image as it is stored, or None if simplejpeg has any objection."""
    height, width = (-(-side // factor) for side in header.stored)
    bytes_needed = height * width * 3
    if buffer is None or buffer.size < bytes_needed:
        buffer = np.empty(bytes_needed, dtype=np.uint8)
    # Memory of exactly this size also makes sure that simplejpeg reads no larger size from the bytes than we did.
    memory = buffer[:bytes_needed]
    low_height, low_width = (height, width) if factor > 1 else (0, 0)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, min_height=low_height, min_width=low_width, buffer=memory)
    except (ValueError, RuntimeError):
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _by_pillow(data: bytes, header: Header, limits: Limits) -> Pixels:
    """The upright image."""
    with Image.open(io.BytesIO(data), formats=(header.kind,)) as image:
        # Either way round: Pillow already says a TIFF's upright size, if it sees its orientation.
        if sorted(image.size) != sorted(header.stored):
            raise _Refusal("corrupt", f"{_sides(header)} pixels to us, {image.width} x {image.height} to the decoder")
        image.load()
        pixels = _pixels(image, limits)
    if header.kind != "TIFF":  # which Pillow has turned
        pixels = _turned(pixels, header.orientation)
    if pixels.shape != (header.height, header.width, 3):
        raise _Refusal(
            "corrupt", f"{_sides(header)} pixels in the header, {pixels.shape[1]} x {pixels.shape[0]} decoded"
        )
    return pixels


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """The image that is seen where the stored one has this EXIF orientation (Exif 2.3, tag 0x0112)."""
    if orientation == 1:
        return pixels
    # As one item of three bytes a pixel, which NumPy moves twice as fast.
    stored = pixels.view("V3")
    if orientation >= 5:
        stored = stored.swapaxes(0, 1)
    # Which axes are mirrored after that.
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(stored[::rows, ::columns]).view(np.uint8)


def _identify(data: bytes, limits: Limits) -> str:
    """Pillow's name of the format, from the first bytes."""
    if len(data) > limits.max_bytes:
        raise _Refusal("too_large", f"{len(data)} bytes, more than max_bytes = {limits.max_bytes}")
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    head = data[:24]
    for signature, name in _REFUSED:
        if head.startswith(signature):
            raise _Refusal("format", f"{name} is not decoded; first bytes {head!r}")
    if head[4:8] == b"ftyp":
        raise _Refusal("format", f"an ISO media file (HEIC, AVIF, video) is not decoded; first bytes {head!r}")
    if b"<svg" in data[:1024].lower():
        raise _Refusal("format", f"SVG is not decoded; first bytes {head!r}")
    raise _Refusal("not_an_image", f"first bytes {head!r}")


def _check_size(header: Header, limits: Limits) -> None:
    sides = (header.height, header.width)
    if min(sides) < limits.min_side:
        raise _Refusal("too_small", f"{_sides(header)} pixels, a side below min_side = {limits.min_side}")
    if max(sides) > limits.max_side:
        raise _Refusal("too_large", f"{_sides(header)} pixels, a side above max_side = {limits.max_side}")
    if header.height * header.width > limits.max_pixels:
        raise _Refusal("too_large", f"{_sides(header)} pixels, more than max_pixels = {limits.max_pixels}")


def _sides(header: Header) -> str:
    return f"{header.width} x {header.height}"


def _pixels(image: Image.Image, limits: Limits) -> Pixels:
    """RGB of an image of any mode."""
    if image.mode in _ALPHA_MODES or (image.mode in _OPAQUE_MODES and "transparency" in image.info):
        backdrop = Image.new("RGBA", image.size, (*limits.background, 255))
        return np.array(Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB"))
    if image.mode in _OPAQUE_MODES:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if image.mode in _MODES_16_BIT:
        # 65535 / 255 = 257. Pillow's own conversion clips instead, to an image almost all white.
        return _grey(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        levels = np.asarray(image)
        if np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 1:
            return _grey(np.rint(levels * 255).astype(np.uint8))
        raise _Refusal("mode", "float pixels outside [0, 1]: what is white is not known")
    raise _Refusal("mode", f"pixels of mode {image.mode!r} have no known scale")


def _grey(levels: Pixels) -> Pixels:
    """(H, W) to (H, W, 3)."""
    return np.repeat(levels[..., None], 3, axis=2)


def _is_cut(kind: str, data: bytes, error: Exception) -> bool:
    """Whether a failure is explained by bytes that are missing at the end."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return True
    match kind:
        case "JPEG":
            return b"\xff\xd9" not in data[-64:]
        case "PNG":
            return b"IEND" not in data[-64:]
        case "GIF":
            return not data.rstrip(b"\x00").endswith(b";")
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "BMP":
            return int.from_bytes(data[2:6], "little") > len(data)
    return False


def _rejected(reason: Reason, error: BaseException) -> Rejected:
    """The decoder's message as one short line of printable ASCII."""
    # Pillow's own message here is the address of the bytes in memory.
    message = "the header makes no sense" if isinstance(error, UnidentifiedImageError) else error
    return Rejected(reason, ascii(f"{type(error).__name__}: {message}")[1:-1][:_DETAIL_LENGTH])
