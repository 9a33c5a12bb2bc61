from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
import torchvision.transforms.v2.functional as TF2
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.views.apply import central_view, crop, normalise, two_views
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import Flavour, Policy, preset
from tests.unit.views import google
from tests.unit.views.images import grey_as_rgb, natural

# (height, width) of images larger and smaller than the views, tiny ones, strips.
SIZES = [(28, 28), (32, 32), (90, 61), (375, 500), (40, 300), (1, 30), (30, 1), (2, 2)]
PLAIN = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0}


def draws_for(images, policy, *, seed=11, ids=None):
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    sizes = np.array([image.shape[:2] for image in images])
    return draw(policy, seed=seed, epoch=0, sample_ids=ids, sizes=sizes)


def reference_crop(image, box, size: int, flip: bool, interpolation: str) -> np.ndarray:
    """torchvision on float64, rounded nowhere."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    mode = TF.InterpolationMode(interpolation)
    view = TF.resized_crop(pixels, *map(int, box), [size, size], mode, antialias=True).clamp(0, 255)
    return (TF.hflip(view) if flip else view)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [28, 96])
def test_crop_is_torchvisions(size: int, interpolation: str):
    policy = Policy(size=size, interpolation=interpolation, **PLAIN)
    images = [natural(h, w, seed) for seed, (h, w) in enumerate(SIZES)]
    d = draws_for(images, policy)
    views = crop(images, d, policy)
    assert views.shape == (len(images), 2, size, size, 3)
    assert views.dtype == np.uint8
    errors = []
    for i, image in enumerate(images):
        for v in range(2):
            box = (d.top[i, v], d.left[i, v], d.height[i, v], d.width[i, v])
            expected = reference_crop(image, box, size, bool(d.flip[i, v]), interpolation)
            errors.append(np.abs(views[i, v] - expected.round()).mean())
    assert np.mean(errors) <= 0.3
    assert np.max(errors) <= 0.6  # bicubic overshoots are clipped between the two passes


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="without AVX2 torchvision v2 resizes uint8 by way of float32",
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [28, 96, 224])
def test_crop_is_torchvisions_uint8_kernel_exactly(size: int, interpolation: str):
    policy = Policy(size=size, interpolation=interpolation, **PLAIN)
    images = [natural(h, w, seed) for seed, (h, w) in enumerate(SIZES)]
    d = draws_for(images, policy)
    assert 0 < d.flip.mean() < 1
    views = crop(images, d, policy)
    for i, image in enumerate(images):
        planar = torch.from_numpy(image).permute(2, 0, 1)
        for v in range(2):
            box = [int(x[i, v]) for x in (d.top, d.left, d.height, d.width)]
            expected = TF2.resized_crop(planar, *box, [size, size], TF.InterpolationMode(interpolation), antialias=True)
            assert expected.dtype == torch.uint8
            expected = TF2.horizontal_flip(expected) if d.flip[i, v] else expected
            assert np.array_equal(views[i, v], expected.permute(1, 2, 0).numpy())


def test_the_papers_crop_is_googles():
    policy = Policy(size=28, flavour="paper", interpolation="bicubic", **PLAIN)
    images = [natural(h, w, seed) for seed, (h, w) in enumerate(SIZES)]
    d = draws_for(images, policy)
    views = two_views(images, d, policy)
    for i, image in enumerate(images):
        for v in range(2):
            top, left, height, width = (int(x[i, v]) for x in (d.top, d.left, d.height, d.width))
            expected = google.resize(image[top : top + height, left : left + width], 28).clip(0, 255)
            expected = expected[:, ::-1] if d.flip[i, v] else expected
            assert np.abs(views[i, v] - expected).max() <= 0.501  # rounding, and nothing else


@pytest.mark.parametrize("flavour", ["torchvision", "paper"])
def test_flip_mirrors_exactly(flavour: Flavour):
    image = natural(50, 70)
    like = {"flavour": flavour, "interpolation": "bicubic", **PLAIN}
    always, never = (Policy(size=24, flip_probability=p, **like) for p in (1.0, 0.0))
    mirrored = crop([image], draws_for([image], always), always)
    straight = crop([image], draws_for([image], never), never)
    assert np.array_equal(mirrored, straight[:, :, :, ::-1])


def test_grey_images_stay_grey():
    policy = preset("cifar", size=28)
    images = [grey_as_rgb(28, 28, seed) for seed in range(20)]
    views = two_views(images, draws_for(images, policy), policy)
    assert np.ptp(views.astype(int), axis=-1).max() <= 1


def test_read_only_images_are_taken_without_a_warning():
    image = natural(28, 28)
    image.flags.writeable = False  # as Arrow hands them out
    policy = preset("cifar", size=28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_views([image], draws_for([image], policy), policy)


@pytest.mark.parametrize("flavour", ["torchvision", "paper"])
@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 2**40))
def test_views_are_the_same_bytes_in_any_company(flavour: Flavour, sizes, cut: int, first_id: int):
    policy = preset("imagenet-broad", size=36, flavour=flavour)
    images = [natural(h, w, seed) for seed, (h, w) in enumerate(sizes)]
    ids = first_id + np.arange(len(images))
    whole = two_views(images, draws_for(images, policy, ids=ids), policy)
    for part in (slice(None, cut), slice(cut, None)):
        if images[part]:
            alone = two_views(images[part], draws_for(images[part], policy, ids=ids[part]), policy)
            assert np.array_equal(alone, whole[part])


@pytest.mark.parametrize("flavour", ["torchvision", "paper"])
def test_images_are_not_changed(flavour: Flavour):
    images = [natural(60, 60)]
    before = images[0].copy()
    policy = preset("imagenet-broad", size=60, flavour=flavour)
    two_views(images, draws_for(images, policy), policy)
    central_view(images, policy)
    assert np.array_equal(images[0], before)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (40, 28), (100, 151), (20, 20)])
def test_central_view_is_the_resized_central_square(height: int, width: int):
    policy = Policy(size=28, interpolation="bicubic", central_fraction=0.875)
    image = natural(height, width)
    view = central_view([image], policy)
    side = round(0.875 * min(height, width))
    box = ((height - side + 1) // 2, (width - side + 1) // 2, side, side)
    assert view.shape == (1, 28, 28, 3)
    assert np.abs(view[0] - reference_crop(image, box, 28, False, "bicubic")).mean() <= 0.55


@pytest.mark.parametrize(("height", "width"), [(28, 28), (100, 151), (375, 500)])
def test_the_papers_central_view_is_googles(height: int, width: int):
    # google-research/simclr, tf2/data_util.center_crop: rint(0.875 * short side), (rest + 1) // 2 in front, bicubic.
    image = natural(height, width)
    view = central_view([image], preset("imagenet", size=28, flavour="paper"))
    side = round(0.875 * min(height, width))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    expected = google.resize(image[top : top + side, left : left + side], 28).clip(0, 255)
    assert np.abs(view[0] - expected).max() <= 0.501


@pytest.mark.parametrize("flavour", ["torchvision", "paper"])
def test_central_view_of_an_image_of_the_right_size_is_that_image(flavour: Flavour):
    image = natural(32, 32)
    assert np.array_equal(central_view([image], preset("cifar", flavour=flavour))[0], image)


@pytest.mark.parametrize("flavour", ["torchvision", "paper"])
def test_central_view_of_a_single_pixel(flavour: Flavour):
    policy = preset("cifar", flavour=flavour)
    assert central_view([np.full((1, 1, 3), 9, np.uint8)], policy).tolist() == [[[[9] * 3] * 32] * 32]


def test_normalise_is_torchvisions_and_channels_last():
    policy = preset("imagenet", size=24)
    views = torch.from_numpy(np.stack([natural(24, 24, seed) for seed in range(3)]))
    out = normalise(views, policy)
    expected = TF.normalize(views.permute(0, 3, 1, 2) / 255, list(policy.mean), list(policy.std))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_normalise_without_mean_gives_zero_to_one():
    views = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 1, 1, 3)
    out = normalise(views, preset("cifar", size=1))
    assert out.shape == (1, 3, 1, 1)
    torch.testing.assert_close(out.flatten(), torch.tensor([0, 0.2, 1]))


def test_no_images_give_no_views():
    policy = preset("cifar")
    nothing = draw(policy, seed=0, epoch=0, sample_ids=np.zeros(0, np.int64), sizes=np.zeros((0, 2), np.int64))
    assert two_views([], nothing, policy).shape == (0, 2, 32, 32, 3)
    assert central_view([], policy).shape == (0, 32, 32, 3)
