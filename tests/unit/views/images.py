"""Images made for the tests: smooth, coloured and a little noisy, as photographs are."""

from __future__ import annotations

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
