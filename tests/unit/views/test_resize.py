from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simclr_ray.views.resize import filter_taps, resize_keys, resize_reduced, taps
from tests.unit.views import google
from tests.unit.views.images import natural

SIZES = [(28, 28, 32), (90, 61, 24), (61, 90, 96), (1, 30, 16), (30, 1, 16), (2, 2, 9), (1, 1, 4), (300, 40, 8)]


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_resize_is_keyss_kernel(height: int, width: int, size: int):
    image = natural(height, width)
    out = resize_keys(torch.from_numpy(image), size)
    assert out.shape == (size, size, 3)
    assert out.dtype == torch.uint8
    error = np.abs(out.numpy() - google.resize(image, size).clip(0, 255))
    assert error.max() <= 0.501  # rounding, and nothing else


# What TensorFlow 2.21 makes of them: tf.image.resize(image / 255, [size, size], "bicubic") * 255, clipped and rounded.
TENSORFLOW = {
    (9, 3, 4): [
        [[155, 137, 184], [102, 172, 201], [54, 176, 179], [41, 145, 131]],
        [[125, 131, 246], [148, 151, 249], [157, 134, 206], [148, 90, 144]],
        [[140, 232, 148], [164, 240, 136], [152, 203, 84], [111, 145, 23]],
        [[14, 175, 155], [5, 162, 195], [93, 146, 146], [221, 137, 37]],
    ],
    (2, 5, 3): [
        [[18, 47, 156], [82, 54, 100], [109, 229, 224]],
        [[56, 100, 166], [40, 72, 178], [133, 166, 221]],
        [[94, 154, 177], [0, 89, 255], [157, 104, 219]],
    ],
}


@pytest.mark.parametrize("shape", TENSORFLOW)
def test_resize_is_tensorflows(shape: tuple[int, int, int]):
    height, width, size = shape
    image = (np.arange(height * width * 3) ** 2 * 37 % 251).reshape(height, width, 3).astype(np.uint8)
    out = resize_keys(torch.from_numpy(image), size).numpy().astype(int)
    assert np.abs(out - TENSORFLOW[shape]).max() <= 1  # theirs looks weights up in a table of 1024 positions


def test_resize_is_neither_torchs_bicubic_nor_antialiased():
    # The reason for this module: torch's kernel has a = -3/4 without antialiasing; with it, it is another filter.
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    ours = resize_keys(torch.from_numpy(image), 32).float()
    for antialias in (False, True):
        theirs = torch.nn.functional.interpolate(pixels, size=(32, 32), mode="bicubic", antialias=antialias)
        assert (theirs[0].permute(1, 2, 0).clamp(0, 255) - ours).abs().max() > 3


def test_a_flat_image_stays_flat_and_an_image_of_the_right_size_stays_itself():
    flat = torch.full((37, 5, 3), 201, dtype=torch.uint8)
    assert (resize_keys(flat, 16) == 201).all()
    image = torch.from_numpy(natural(24, 24))
    assert torch.equal(resize_keys(image, 24), image)


def test_strides_do_not_matter():
    image = torch.from_numpy(natural(40, 50))
    part = image[3:30, 7:41]
    assert torch.equal(resize_keys(part, 16), resize_keys(part.contiguous(), 16))


@pytest.mark.parametrize(("length", "size"), [(1, 1), (1, 7), (2, 5), (500, 224), (224, 224), (31, 32), (5000, 3)])
def test_weights_sum_to_one_and_reach_no_further_than_the_line(length: int, size: int):
    index, weights = taps(length, size)
    assert index.min() >= 0
    assert index.max() < length
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(size))


# --- crops of a reduced image ---------------------------------------------------------------------------------------

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# top, left, height, width in pixels of the full image, and what it was divided by.
FRACTIONAL = [((37, 101, 225, 331), 2), ((2, 3, 401, 258), 4), ((13, 21, 611, 700), 8), ((1, 1, 64, 511), 2)]


def reduced_image(factor: int, seed: int = 0) -> np.ndarray:
    return natural(-(-640 // factor), -(-760 // factor), seed)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("size", [24, 32])
@pytest.mark.parametrize(("box", "factor"), FRACTIONAL)
def test_a_fractional_box_lies_where_pillow_has_it(box, factor: int, size: int, interpolation: str):
    top, left, height, width = box
    image = reduced_image(factor)
    corners = (left / factor, top / factor, (left + width) / factor, (top + height) / factor)
    expected = np.asarray(Image.fromarray(image).resize((size, size), PILLOW[interpolation], box=corners)).astype(int)
    out = resize_reduced(torch.from_numpy(image), box, size, factor, interpolation).numpy()
    assert out.shape == (size, size, 3)
    assert out.dtype == np.uint8
    inside = (slice(3, -3), slice(3, -3))  # at its edge Pillow looks beyond the box
    assert np.abs(out - expected)[inside].max() <= 1
    assert np.abs(out - expected).max() < 40


@pytest.mark.parametrize("interpolation", PILLOW)
def test_a_box_of_whole_pixels_is_torchs_resize_but_for_the_bits_of_weights(interpolation):
    image = torch.from_numpy(natural(90, 120))
    out = resize_reduced(image, (24, 8, 256, 424), 20, 4, interpolation)
    crop = image[6:70, 2:108].permute(2, 0, 1)[None]
    expected = F.interpolate(crop, size=(20, 20), mode=interpolation, antialias=True)[0].permute(1, 2, 0)
    assert (out.int() - expected.int()).abs().max() <= 1
    assert (out != expected).float().mean() <= 0.02


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize(("box", "factor"), FRACTIONAL)
def test_pixels_that_the_box_does_not_reach_into_count_for_nothing(box, factor: int, interpolation):
    top, left, height, width = box
    image = torch.from_numpy(reduced_image(factor))
    expected = resize_reduced(image, box, 24, factor, interpolation)
    beyond = torch.full_like(image, 255)
    inside = (slice(top // factor, -(-(top + height) // factor)), slice(left // factor, -(-(left + width) // factor)))
    beyond[inside] = image[inside]
    assert not torch.equal(beyond, image)
    assert torch.equal(resize_reduced(beyond, box, 24, factor, interpolation), expected)


@given(
    st.sampled_from([2, 4, 8]), st.integers(0, 7), st.integers(1, 9000), st.integers(1, 512), st.sampled_from([*PILLOW])
)
def test_sums_of_a_fractional_resize_are_exact_and_keep_a_flat_image(factor, before, length, size, interpolation):
    before %= factor
    index, weights, precision = filter_taps(before, length, factor, size, interpolation)
    pixels = -(-(before + length) // factor)
    assert index.min() >= 0
    assert index.max() < pixels
    assert torch.equal(weights, weights.round())
    assert weights.abs().max() < 1 << 15  # as the kernel keeps them
    assert weights.abs().sum(dim=1).max() * 255 + (1 << precision) < 1 << 24  # as float32 counts
    level = 255 * weights.sum(dim=1) / (1 << precision)
    assert (level - 255).abs().max() < 0.5
