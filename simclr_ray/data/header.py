"""What an image file says of itself: its size, which way is up, and how it is coded. No pixel is decoded.

The bytes are hostile until shown otherwise. Nothing is allocated by what they claim, and every walk over their parts
is bounded: Pillow walks some of the same parts in Python, so that a file of nothing but parts would keep it busy for
minutes. What is not understood here is not decoded anywhere.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

# Files have tens of parts (segments, chunks, blocks), the longest PNGs some ten thousand.
_MAX_PARTS: Final = 50_000
# Of 255 bytes each, as a rule: the pixels of a GIF's first frame.
_MAX_PIXEL_BLOCKS: Final = 1_000_000
# Bytes between two JPEG segments that belong to neither; a few are seen in the wild.
_MAX_JUNK: Final = 65_536
# Pillow joins them two by two. One is usual, of at most 64 KB.
_MAX_EXIF: Final = 100
# Each scan is a pass over every coefficient, however few bytes it has. Encoders write about 10.
_MAX_SCANS: Final = 64
# Pillow makes a Python object of each strip or tile.
_MAX_TILES: Final = 250_000
# Bytes and pixels of a run-length coded BMP, which Pillow expands in Python.
_MAX_RUN_LENGTH: Final = 16_000_000
# As much of an XMP packet is searched for an orientation.
_MAX_TEXT: Final = 1 << 20

_ORIENTATION: Final = 0x0112
_XMP_ORIENTATION: Final = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_XMP_IN_JPEG: Final = b"http://ns.adobe.com/xap/1.0/\x00"
# TIFF's integers by their type number. A byte is no number to Pillow, and so none here.
_INTEGERS: Final = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q"}

_SOF: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITH_LENGTH: Final = _SOF | {0xC4, 0xCC, *range(0xDA, 0xF0), 0xFE}
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD9)})
# The last two name the wrong byte order; Pillow reads them.
_TIFF_SIGNATURES: Final = frozenset({b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+", b"II\x00*", b"MM*\x00"})


class BadHeader(ValueError):
    """The file is cut within its header, or its header makes no sense."""


class Excessive(BadHeader):
    """The file asks for more work than any file in good faith does."""


class Header(NamedTuple):
    """What is known of a file before it is decoded."""

    kind: str
    """Pillow's name of the format."""
    height: int
    """Rows of the upright image."""
    width: int
    """Columns of the upright image."""
    orientation: int = 1
    """EXIF orientation of the stored image, 1 to 8; `height` and `width` have it applied."""
    animated: bool = False
    """A GIF, WebP or PNG of several frames."""
    plain: bool = False
    """A JPEG of the usual kinds: Huffman coded, 8 bits, grey or three components."""
    scans: int = 1
    """Passes of a JPEG over its image; more than one if progressive."""

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width as they lie in the file."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def reducible(self) -> bool:
        """Whether it can be decoded at a half, a quarter or an eighth of its size and time is won by it."""
        return self.plain and self.scans == 1


def parse(kind: str, data: bytes) -> Header:
    """Read the header of a file of the given format.

    Args:
        kind: "JPEG", "PNG", "WEBP", "GIF", "BMP" or "TIFF"; the signature has been seen.
        data: The whole file.

    Raises:
        BadHeader: Or its subclass `Excessive`.
    """
    try:
        return _PARSERS[kind](data)
    except (IndexError, struct.error) as error:
        raise BadHeader("truncated header") from error


def _header(kind: str, height: int, width: int, orientation: int, *, animated: bool = False) -> Header:
    if orientation >= 5:
        height, width = width, height
    return Header(kind, height, width, orientation, animated)


# --- JPEG ----------------------------------------------------------------------------------------------------------


def _jpeg(data: bytes) -> Header:
    at = 2
    frame = junk = components = blocks = 0
    height = width = precision = 0
    exif = xmp = b""
    for _ in range(_MAX_PARTS):
        found = data.find(b"\xff", at)
        if found < 0:
            raise BadHeader("truncated header")
        junk += found - at
        at = found + 1
        while (marker := data[at]) == 0xFF and junk <= _MAX_JUNK:  # fill bytes may precede any marker
            at += 1
            junk += 1
        if junk > _MAX_JUNK:
            raise Excessive(f"more than {_MAX_JUNK} bytes between segments")
        at += 1
        if marker in _WITH_LENGTH:
            length = data[at] << 8 | data[at + 1]
            if marker == 0xDA:
                break
            if marker in _SOF:
                if frame:
                    raise BadHeader("two frames")
                frame = marker
                precision, height, width, components = struct.unpack_from(">BHHB", data, at + 2)
            elif marker == 0xE1:
                if data.startswith(b"Exif\x00\x00", at + 2):
                    exif = exif or data[at + 2 : at + length]
                    blocks += 1
                elif data.startswith(_XMP_IN_JPEG, at + 2):
                    xmp = data[at + 2 : at + length]
            at += max(2, length)  # the length counts itself; libjpeg and Pillow forgive where it does not
        elif marker == 0x00:
            junk += 2
        elif marker not in _ALONE:
            raise BadHeader(f"marker {marker:#x} before the first scan")
    else:
        raise Excessive(f"more than {_MAX_PARTS} segments")
    if blocks > _MAX_EXIF:
        raise Excessive(f"{blocks} blocks of EXIF, more than {_MAX_EXIF}")
    if not frame:
        raise BadHeader("a scan before its frame")
    sequential = frame in (0xC0, 0xC1)
    scans = 1 if sequential and data[at + 2] == components else data.count(b"\xff\xda", at - 2)
    if scans > _MAX_SCANS:
        raise Excessive(f"{scans} scans, more than {_MAX_SCANS}, each a pass over the whole image")
    orientation = _orientation(exif, xmp) if exif or xmp else 1
    if orientation >= 5:
        height, width = width, height
    plain = (sequential or frame == 0xC2) and precision == 8 and components in (1, 3)
    return Header("JPEG", height, width, orientation, False, plain, scans)


# --- PNG -----------------------------------------------------------------------------------------------------------


def _png(data: bytes) -> Header:
    length, tag, width, height = struct.unpack_from(">I4sII", data, 8)
    if tag != b"IHDR" or length != 13:
        raise BadHeader(f"first chunk {tag!r} of {length} bytes")
    exif = profile = xmp = b""
    animated = pixels = False
    for tag, start, end in _chunks(data, 33, ">I4s", trailer=4):
        if tag == b"IDAT":
            pixels = True
        elif tag == b"IEND" or (tag == b"fcTL" and animated and pixels):
            break  # as Pillow, which does not look beyond the first frame
        elif tag == b"acTL":
            animated = not pixels and int.from_bytes(data[start : start + 4], "big") > 1
        elif tag == b"eXIf":
            exif = data[start:end]
        elif tag in (b"iTXt", b"zTXt", b"tEXt"):
            if data.startswith(b"XML:com.adobe.xmp\x00", start):
                xmp = tag + data[start : min(end, start + _MAX_TEXT)]
            elif data.startswith(b"Raw profile type exif\x00", start):
                profile = tag + data[start : min(end, start + _MAX_TEXT)]
    # Unpacked once, whatever their number: the last counts.
    xmp = _png_text(xmp)
    if profile and not exif:
        exif = _from_hex(_png_text(profile))
    return _header("PNG", height, width, _orientation(exif, xmp) if exif or xmp else 1, animated=animated)


def _png_text(chunk: bytes) -> bytes:
    """The text of a text chunk, which starts with its tag; empty if it cannot be unpacked."""
    tag = chunk[:4]
    _, _, text = chunk[4:].partition(b"\x00")
    packed = tag == b"zTXt"
    if packed:
        text = text[1:]
    elif tag == b"iTXt":
        packed = text[:1] != b"\x00"
        text = text[2:].split(b"\x00", 2)[-1]
    if not packed:
        return text
    try:
        return zlib.decompressobj().decompress(text, _MAX_TEXT)
    except zlib.error:
        return b""


def _from_hex(profile: bytes) -> bytes:
    """The bytes of ImageMagick's profiles: two lines of name and length after an empty one, then hexadecimal lines."""
    try:
        return bytes.fromhex("".join(profile.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


# --- WebP ----------------------------------------------------------------------------------------------------------


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise BadHeader("no key frame")
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WEBP", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L":
        if data[20] != 0x2F:
            raise BadHeader("no lossless signature")
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("WEBP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise BadHeader(f"first chunk {kind!r}")
    if len(data) < 30:
        raise BadHeader("truncated header")
    width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
    exif = xmp = b""
    frames = 0
    for tag, start, end in _chunks(data, 12, "<4sI", even=True):
        if tag == b"ANMF":
            frames += 1
        elif tag == b"EXIF":
            exif = data[start:end]
        elif tag == b"XMP ":
            xmp = data[start : min(end, start + _MAX_TEXT)]
    return _header("WEBP", height, width, _orientation(exif, xmp) if exif or xmp else 1, animated=frames > 1)


def _chunks(
    data: bytes, at: int, head: str, *, trailer: int = 0, even: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Tag, start and end of each whole chunk.

    Args:
        data: The file.
        at: Where the first chunk starts.
        head: Struct of a tag and a length of four bytes each, in either order.
        trailer: Bytes after each chunk.
        even: Chunks of odd length have one byte more.
    """
    unpack = struct.Struct(head).unpack_from
    for _ in range(_MAX_PARTS):
        if at + 8 > len(data):
            return
        first, second = unpack(data, at)
        tag, length = (first, second) if isinstance(first, bytes) else (second, first)
        end = at + 8 + length
        if end > len(data):
            return
        yield tag, at + 8, end
        at = end + trailer + (length & 1 if even else 0)
    raise Excessive(f"more than {_MAX_PARTS} chunks")


# --- GIF -----------------------------------------------------------------------------------------------------------


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    frame = _gif_frame(data, 13 + _table(flags))
    if frame is None:
        raise BadHeader("no image before the end")
    left, top, wide, high, flags = struct.unpack_from("<HHHHB", data, frame + 1)
    # As Pillow, which widens the screen to the first frame.
    width, height = max(width, left + wide), max(height, top + high)
    try:
        after, _ = _after_blocks(data, frame + 10 + _table(flags) + 1, _MAX_PIXEL_BLOCKS)
        animated = _gif_frame(data, after) is not None
    except (IndexError, Excessive):  # nothing after the first frame matters to Pillow, and it tells if that is cut
        animated = False
    return Header("GIF", height, width, animated=animated)


def _table(flags: int) -> int:
    """Bytes of the colour table that the flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_frame(data: bytes, at: int) -> int | None:
    """Where the next image descriptor is, past extensions; None at the end of the file."""
    left = _MAX_PARTS
    while left > 0:
        introducer = data[at]
        if introducer == 0x2C:
            return at
        if introducer == 0x3B:
            return None
        if introducer == 0x21:
            at, left = _after_blocks(data, at + 2, left)
        else:
            at += 1
            left -= 1
    raise Excessive(f"more than {_MAX_PARTS} blocks of extensions")


def _after_blocks(data: bytes, at: int, most: int) -> tuple[int, int]:
    """Where the sub-blocks that start here have ended, and how many of `most` are left."""
    for left in range(most - 1, -1, -1):
        length = data[at]
        at += length + 1
        if not length:
            return at, left
    raise Excessive(f"more than {_MAX_PARTS} blocks")


# --- BMP and TIFF --------------------------------------------------------------------------------------------------


def _bmp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return Header("BMP", height, width)
    if size not in (40, 52, 56, 64, 108, 124):
        raise BadHeader(f"a header of {size} bytes")
    width, height, _, _, coding = struct.unpack_from("<IIHHI", data, 18)
    if height >> 24 == 0xFF:  # stored from the top
        height = 2**32 - height
    if coding in (1, 2) and (most := max(len(data), height * width)) > _MAX_RUN_LENGTH:
        raise Excessive(f"{most} bytes or pixels in run lengths, more than {_MAX_RUN_LENGTH}")
    return Header("BMP", height, width)


def _tiff(data: bytes) -> Header:
    entries = _directory(data)
    width, height = entries.get(256), entries.get(257)
    if width is None or height is None or width.value is None or height.value is None:
        raise BadHeader("no size")
    tiles = max((entries[tag].values for tag in (273, 324) if tag in entries), default=0)
    if tiles > _MAX_TILES:
        raise Excessive(f"{tiles} strips or tiles, more than {_MAX_TILES}")
    turn = entries.get(_ORIENTATION)
    xmp = entries.get(700)
    orientation = 1
    if turn is not None:
        orientation = _valid(turn.value)
    elif xmp is not None and xmp.offset is not None:
        orientation = _orientation(b"", data[xmp.offset : xmp.offset + min(xmp.values, _MAX_TEXT)])
    return _header("TIFF", height.value, width.value, orientation)


class _Entry(NamedTuple):
    values: int
    value: int | None
    """The first integer, if it lies in the entry itself."""
    offset: int | None
    """Where the values are, if they do not fit the entry."""


def _directory(data: bytes) -> dict[int, _Entry]:
    """The entries of a TIFF's first directory; EXIF is a TIFF too.

    Raises:
        BadHeader: No TIFF.
        struct.error: Cut before the first entry.
    """
    if data[:4] not in _TIFF_SIGNATURES:
        raise BadHeader(f"no TIFF: {data[:4]!r}")
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)
    if at > len(data):
        raise BadHeader("no directory")
    (number,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    at += 8 if big else 2
    entry = struct.Struct(order + ("HHQ8s" if big else "HHL4s"))
    inside = 8 if big else 4
    whole = min(number, (len(data) - at) // entry.size)
    if whole > _MAX_PARTS:
        raise Excessive(f"{whole} entries, more than {_MAX_PARTS}")
    entries: dict[int, _Entry] = {}
    for tag, type_, count, raw in entry.iter_unpack(data[at : at + whole * entry.size]):
        value: int | None = None
        offset: int | None = None
        code = _INTEGERS.get(type_)
        size = (struct.calcsize(order + code) if code else 1) * count
        if size > inside:
            (offset,) = struct.unpack(order + ("Q" if big else "L"), raw)
        elif code and count:
            (value,) = struct.unpack_from(order + code, raw)
        entries.setdefault(tag, _Entry(count, value, offset))  # of two, Pillow too reads the first
    return entries


# --- which way is up -----------------------------------------------------------------------------------------------


def _orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8: from the EXIF block if it tells, else from XMP, else 1. Broken metadata does not spoil good pixels."""
    if exif:
        for _ in range(2):
            exif = exif.removeprefix(b"Exif\x00\x00")
        try:
            entry = _directory(exif).get(_ORIENTATION)
        except (ValueError, struct.error):
            return 1
        if entry is not None:
            return _valid(entry.value)
    found = _XMP_ORIENTATION.search(xmp)
    return _valid(int(found[1])) if found else 1


def _valid(orientation: int | None) -> int:
    return orientation if orientation is not None and 1 <= orientation <= 8 else 1


_PARSERS: Final[dict[str, Callable[[bytes], Header]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
}
