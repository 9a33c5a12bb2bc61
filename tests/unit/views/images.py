"""Images made for the tests: smooth, coloured and a little noisy, as photographs are."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt


def natural(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Waves of falling amplitude in each channel, shifted against each other, and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = np.zeros((height, width, 3))
    for octave in range(5):
        ky, kx, phase = rng.uniform(-1, 1, 3) * (2.0**octave * 6, 2.0**octave * 6, np.pi)
        image += np.sin(ky * y + kx * x + phase)[..., None] * rng.uniform(-1, 1, 3) * 0.7**octave
    image = (image - image.min()) / np.ptp(image) * 255 + rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def grey_as_rgb(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.repeat(natural(height, width, seed)[..., :1], 3, axis=2)


def png_of_16_bits(levels: npt.NDArray[np.uint16]) -> bytes:
    """A PNG of (H, W, channels) uint16, which Pillow can only write in grey."""
    height, width, channels = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in levels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
