"""Bytes of anyone's image files to RGB pixels, or a reason why not.

Bad input is a value here, never an exception: the stream counts and lists `Rejected`, and training goes on. The
bytes are hostile until shown otherwise. What they are is told from their first bytes, only the six allowed formats
ever reach a decoder, and the header's size is checked before a pixel is decoded. The caller bounds the memory of
the process for the rest.

Accepted knowingly: damage that the format cannot detect (bits flipped inside a JPEG's scan), and the first frame
of an animation.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from simclr_ray.errors import ConfigError

Reason = Literal["null", "empty", "not_an_image", "format", "truncated", "too_large", "too_small", "mode", "corrupt"]
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)
Pixels = npt.NDArray[np.uint8]

# Pillow refuses more than twice this by itself, whatever the caller allows.
_PILLOW_MAX_PIXELS: Final = 2 * 89_478_485
_DETAIL_LENGTH: Final = 160
_ORIENTATION: Final = 0x0112
# EXIF orientation to the transposition that undoes it (Exif 2.3, tag 0x0112).
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow keeps what may tell an orientation. Reading EXIF costs more than decoding a small image, so it is
# only read where there is some. (TIFF has its own tag, which Pillow applies on loading.)
_METADATA: Final = frozenset({"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"})
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
    """Most pixels of an image; about three times as many bytes are used for it."""
    max_side: int = 20_000
    """Longest side, in pixels."""
    min_side: int = 2
    """Shortest side, in pixels."""
    max_bytes: int = 100_000_000
    """Longest encoded image."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green and blue that show through transparent pixels."""

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


@dataclass(frozen=True)
class Rejected:
    """Why an image was not decoded."""

    reason: Reason
    detail: str
    """A short line of printable ASCII for the reader; what came from the bytes is escaped."""


class _Refusal(Exception):
    """Carries a `Rejected` out of the steps of `decode`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.rejected = Rejected(reason, detail[:_DETAIL_LENGTH])


def decode(data: bytes | None, limits: Limits) -> Pixels | Rejected:
    """Decode one image. Never raises, whatever the bytes are.

    Args:
        data: The encoded image: JPEG, PNG, WebP, GIF, BMP or TIFF. None is a null of the table it came from.
        limits: What to refuse.

    Returns:
        (H, W, 3) uint8, writable: upright (EXIF), the first frame, transparency composited on the background, 16
        bits scaled to 8; or the reason why not.
    """
    if data is None:
        return Rejected("null", "no bytes: the value is null")
    if not data:
        return Rejected("empty", "0 bytes")
    kind = ""
    try:
        kind = _identify(data, limits)
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            _check_size(image.size, limits)
            image.load()
            return _pixels(_upright(image), limits)
    except _Refusal as refusal:
        return refusal.rejected
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return _rejected("too_large", error)
    except Exception as error:  # a trust boundary: decoders fail on hostile bytes in ways that nobody can list
        return _rejected("truncated" if _is_cut(kind, data, error) else "corrupt", error)


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


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if min(size) < limits.min_side:
        raise _Refusal("too_small", f"{width} x {height} pixels, a side below min_side = {limits.min_side}")
    if max(size) > limits.max_side:
        raise _Refusal("too_large", f"{width} x {height} pixels, a side above max_side = {limits.max_side}")
    if width * height > limits.max_pixels:
        raise _Refusal("too_large", f"{width} x {height} pixels, more than max_pixels = {limits.max_pixels}")


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation wants to be seen."""
    if _METADATA.isdisjoint(image.info):
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata does not spoil good pixels
        return image
    step = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if step is None else image.transpose(step)


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
    return Rejected(reason, ascii(f"{type(error).__name__}: {error}")[1:-1][:_DETAIL_LENGTH])
