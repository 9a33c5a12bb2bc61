"""Laws of the C kernel: it makes what its twin in torch makes, the same bytes everywhere, and touches nothing else."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data.decode import Decoded
from simclr_ray.views import apply, native
from simclr_ray.views.draw import Draws, draw
from simclr_ray.views.policy import Policy, preset
from tests.unit.views.images import grey_as_rgb, natural

ROOT = Path(__file__).parents[3]
LEVELS = {native.PLAIN: "plain", native.AVX2: "AVX2", native.AVX512: "AVX-512"}
# (height, width): as large as views, larger, much larger, strips, and too small for the taps that are read at once.
SIZES = [(28, 28), (32, 32), (90, 61), (375, 500), (40, 300), (1, 30), (30, 1), (2, 2), (1, 1), (3, 5)]
PLAIN = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0}

built = pytest.mark.skipif(not native.available(), reason=native.why_not())


def best_level() -> int:
    """The best instruction set that the kernel uses here: asked for a better one, it takes this."""
    kernel, _ = native._load()
    job = native._Job(version=native._VERSION, level=native.AVX512, size=1, taps=1)
    assert kernel is not None
    assert kernel(ctypes.byref(job)) == native._DONE
    return job.level


BEST = best_level() if native.available() else native.PLAIN


def at_each(*levels: int) -> pytest.MarkDecorator:
    """A parameter `level`; what the processor lacks is skipped, for the kernel would take a lower one."""
    lacking = [pytest.mark.skipif(level > BEST, reason=f"the processor lacks {LEVELS[level]}") for level in levels]
    return pytest.mark.parametrize(
        "level",
        [pytest.param(level, id=LEVELS[level], marks=mark) for level, mark in zip(levels, lacking, strict=True)],
    )


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """What no photograph is, and every clip and every rounding meets."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def images_of(sizes, kind=natural) -> list[np.ndarray]:
    return [kind(h, w, seed) for seed, (h, w) in enumerate(sizes)]


def draws_for(images, policy: Policy, *, seed: int = 11, ids=None, views: int = 2) -> Draws:
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    sizes = np.array([image.shape[:2] for image in images])
    return draw(policy, seed=seed, epoch=0, sample_ids=ids, sizes=sizes, views=views)


def one(draws: Draws, **changes) -> Draws:
    """Draws with some parameters the same in all views."""
    return replace(
        draws, **{k: np.broadcast_to(np.asarray(v), getattr(draws, k).shape).copy() for k, v in changes.items()}
    )


def differences(images, draws: Draws, policy: Policy) -> np.ndarray:
    """Between the kernel's finished views and the twin's, in levels."""
    ours = native.two_views(images, draws, policy)
    theirs = apply.two_views(images, draws, policy)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs)


@built
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 8, 28, 96, 224])
@pytest.mark.parametrize("kind", [natural, noise])
def test_crops_are_the_twins_bytes(size: int, interpolation: str, kind):
    policy = Policy(size=size, interpolation=interpolation, **PLAIN)
    images = images_of(SIZES, kind)
    d = draws_for(images, policy)
    assert np.array_equal(native.crop(images, d, policy), apply.crop(images, d, policy))


@built
@pytest.mark.parametrize("kind", [natural, noise])
@pytest.mark.parametrize("size", [1, 8, 28, 96, 224])
def test_crops_of_flavour_paper_are_the_twins_but_for_rounding(size: int, kind):
    policy = preset("imagenet", flavour="paper", size=size)
    images = images_of(SIZES, kind)
    d = draws_for(images, policy)
    difference = np.abs(native.crop(images, d, policy).astype(int) - apply.crop(images, d, policy))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


@built
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_large_images_shrink_and_tiny_ones_grow_as_the_twins(interpolation: str):
    policy = Policy(size=32, interpolation=interpolation, **PLAIN)
    large = [noise(2001, 1503)]
    d = one(draws_for(large, policy), top=0, left=0, height=2001, width=1503)
    assert np.array_equal(native.crop(large, d, policy), apply.crop(large, d, policy))
    policy = policy.model_copy(update={"size": 1024})
    tiny = [noise(2, 3)]
    d = draws_for(tiny, policy)
    assert np.array_equal(native.crop(tiny, d, policy), apply.crop(tiny, d, policy))


@st.composite
def reduced_images(draw_from) -> tuple[Policy, Decoded, Draws]:
    """An image that stands for one of up to 900 pixels a side, and crops of it from its first pixel to its last."""
    by = draw_from(st.sampled_from([2, 4, 8]))
    sides = [draw_from(st.one_of(st.integers(1, 40), st.integers(1, 900))) for _ in range(2)]
    policy = Policy(
        size=draw_from(st.sampled_from([1, 7, 32, 45, 224])),
        interpolation=draw_from(st.sampled_from(["bilinear", "bicubic"])),
        **PLAIN,
    )
    kind = draw_from(st.sampled_from([noise, natural]))
    image = Decoded(kind(*(-(-side // by) for side in sides), draw_from(st.integers(0, 9))), by)
    d = draw(policy, seed=0, epoch=0, sample_ids=np.zeros(1, np.int64), sizes=np.array([sides]), views=1)
    lengths = [draw_from(st.integers(1, side)) for side in sides]
    starts = [draw_from(st.integers(0, side - length)) for side, length in zip(sides, lengths, strict=True)]
    d = one(d, height=lengths[0], width=lengths[1], top=starts[0], left=starts[1])
    return policy, image, d


@built
@settings(max_examples=200, deadline=None)
@given(reduced_images())
def test_crops_at_fractions_of_a_pixel_are_the_twins_bytes(case):
    policy, image, d = case
    expected = apply.crop([image], d, policy)
    for level in range(BEST + 1):
        assert np.array_equal(native._make([image], d, policy, colours=False, level=level), expected)


@built
def test_full_and_reduced_images_of_one_batch_do_not_disturb_each_other():
    policy = preset("imagenet", size=48)
    sizes = np.array([(200, 300), (300, 200), (201, 299), (64, 64)])
    images = [Decoded(natural(*-(-size // by), seed=by), by) for size, by in zip(sizes, (2, 1, 4, 8), strict=True)]
    mixed = [images[0], images[1].pixels, *images[2:]]
    d = draw(policy, seed=3, epoch=0, sample_ids=np.arange(4), sizes=sizes)
    views = native.two_views(mixed, d, policy)
    for i, image in enumerate(images):
        assert np.array_equal(native.two_views([image], d[i : i + 1], policy)[0], views[i])
    difference = np.abs(views.astype(int) - apply.two_views(mixed, d, policy))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


@built
@pytest.mark.parametrize("by", [0, -2, 3, 16, 2**31 - 1])
def test_a_reduction_that_is_none_is_refused(by: int):
    policy = preset("cifar")
    d = draws_for([natural(10, 10)] * 2, policy)
    with pytest.raises(ValueError, match=f"image 1 is reduced by {by}, not by 1, 2, 4 or 8"):
        native.crop([natural(10, 10), Decoded(natural(10, 10), by)], d, policy)


@built
def test_flavour_paper_takes_no_reduced_image():
    policy = preset("cifar", flavour="paper")
    d = draws_for([natural(10, 10)], policy)
    with pytest.raises(ValueError, match="not by 1 in flavour paper"):
        native.crop([Decoded(natural(10, 10), 2)], d, policy)


@built
def test_a_crop_outside_what_a_reduced_image_stands_for_is_refused():
    policy = preset("cifar")
    d = one(draws_for([natural(10, 10)], policy), top=0, left=0, height=20, width=20)
    image = Decoded(natural(10, 10), 2)
    native.crop([image], d, policy)
    with pytest.raises(ValueError, match=r"not inside image 0 of \(10, 10\) pixels reduced by 2"):
        native.crop([image], one(d, top=1), policy)


@built
@pytest.mark.parametrize("kind", [natural, noise])
@pytest.mark.parametrize(("name", "size"), [("imagenet-broad", 224), ("imagenet", 64), ("cifar", 32), ("cifar", 28)])
def test_views_are_the_twins_but_for_rounding(name, size: int, kind):
    policy = preset(name, size=size)
    images = images_of(SIZES, kind) * 2
    difference = differences(images, draws_for(images, policy), policy)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


@built
@pytest.mark.parametrize("kind", [natural, noise])
@pytest.mark.parametrize(("name", "size"), [("imagenet-broad", 224), ("cifar", 32)])
def test_views_of_flavour_paper_are_the_twins_but_for_rounding(name, size: int, kind):
    policy = preset(name, size=size, flavour="paper")
    images = images_of(SIZES, kind) * 2
    difference = differences(images, draws_for(images, policy), policy)
    assert (difference > 0).mean() <= 2e-3
    assert (difference > 1).mean() <= 1e-5  # the jitter stretches a crop's level


@st.composite
def policies(draw_from) -> Policy:
    def probability() -> float:
        return draw_from(st.sampled_from([0.0, 0.5, 1.0]))

    def strength(most: float) -> float:
        return draw_from(st.sampled_from([0.0, most / 2, most]))

    low, high = sorted(draw_from(st.tuples(st.floats(0.05, 6), st.floats(0.05, 6))))
    return Policy(
        size=draw_from(st.integers(8, 70)),
        interpolation=draw_from(st.sampled_from(["bilinear", "bicubic"])),
        crop_scale=draw_from(st.sampled_from([(0.01, 1.0), (0.08, 1.0), (1.0, 1.0)])),
        flip_probability=probability(),
        jitter_probability=probability(),
        brightness=strength(2),
        contrast=strength(2),
        saturation=strength(2),
        hue=strength(0.5),
        grayscale_probability=probability(),
        blur_probability=probability(),
        blur_sigma=(low, high),
        blur_kernel_fraction=draw_from(st.floats(0.01, 1)),
        solarize_probability=probability(),
    )


@built
@settings(max_examples=150, deadline=None)
@given(policies(), st.lists(st.sampled_from(SIZES), min_size=1, max_size=3), st.integers(0, 2**40), st.booleans())
def test_views_of_any_policy_are_within_a_level_of_the_twins(policy: Policy, sizes, seed: int, noisy: bool):
    images = images_of(sizes, noise if noisy else natural)
    assert differences(images, draws_for(images, policy, seed=seed), policy).max() <= 1


@built
@pytest.mark.parametrize("flavour", ["torchvision", "paper"])
def test_all_orders_of_the_jitter_are_the_twins(flavour):
    policy = preset("imagenet", size=28, flavour=flavour)
    images = [natural(28, 28), noise(40, 30), grey_as_rgb(28, 28)]
    orders = np.array(list(itertools.permutations(range(4))), np.int8)
    d = one(draws_for(images, policy, views=len(orders)), jitter=True, grayscale=False, blur=False, order=orders)
    views = native.two_views(images, d, policy)
    assert len(np.unique(views[0].reshape(len(orders), -1), axis=0)) > 8
    difference = differences(images, d, policy)
    assert difference.max() <= (1 if flavour == "torchvision" else 6)
    assert (difference > 0).mean() <= 1e-3


@built
@pytest.mark.parametrize("flavour", ["torchvision", "paper"])
@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.6, 1.0, 1.7, 2.0, 3.0, 20.0])
@pytest.mark.parametrize(("size", "fraction"), [(1, 1.0), (5, 1.0), (7, 0.9), (33, 1.0), (96, 0.3)])
def test_blur_is_the_twins(size: int, fraction: float, sigma: float, flavour):
    policy = preset("imagenet", size=size, flavour=flavour).model_copy(update={"blur_kernel_fraction": fraction})
    images = [noise(size, size), natural(size, size)]
    d = one(draws_for(images, policy), top=0, left=0, height=size, width=size, jitter=False, blur=True, sigma=sigma)
    assert differences(images, d, policy).max() <= 1


@built
def test_blur_leaves_a_flat_view_as_it_is():
    policy = Policy(size=40, jitter_probability=0, blur_probability=1, grayscale_probability=0)
    image = np.full((40, 40, 3), 77, np.uint8)
    assert (native.two_views([image], draws_for([image], policy), policy) == 77).all()


@built
@pytest.mark.parametrize("threshold", [0.0, 10.0, 200.5, 255.0])
def test_solarize_is_the_twins(threshold: float):
    policy = preset("imagenet-broad", size=64).model_copy(update={"solarize_threshold": threshold})
    images = images_of([(64, 64), (375, 500)])
    d = one(draws_for(images, policy), solarize=True)
    assert (differences(images, d, policy) > 0).mean() <= 1e-3
    d = one(d, jitter=False, blur=False, grayscale=False)
    assert differences(images, d, policy).max() == 0


@built
@pytest.mark.parametrize("flavour", ["torchvision", "paper"])
def test_nothing_drawn_gives_the_image_and_a_flip_its_mirror_image(flavour):
    policy = preset("imagenet", size=37, flavour=flavour)
    image = noise(37, 37)
    d = one(draws_for([image], policy), top=0, left=0, height=37, width=37, jitter=False, grayscale=False, blur=False)
    assert np.array_equal(native.two_views([image], one(d, flip=False), policy)[0, 0], image)
    assert np.array_equal(native.two_views([image], one(d, flip=True), policy)[0, 0], image[:, ::-1])
    neutral = one(d, flip=False, jitter=True, brightness=1, contrast=1, saturation=1, hue=0)
    assert np.array_equal(native.two_views([image], neutral, policy)[0, 0], image)
    turned = native.two_views([image], replace(neutral, hue=neutral.hue - 1), policy)[0, 0]
    assert np.abs(turned.astype(int) - image).max() <= 1


@built
@at_each(native.AVX2, native.AVX512)
@pytest.mark.parametrize("policy", [preset("imagenet-broad", size=45), preset("imagenet", size=96, flavour="paper")])
def test_every_instruction_set_gives_the_same_bytes(policy: Policy, level: int):
    images = images_of([*SIZES, (700, 900)], noise)
    d = draws_for(images, policy, views=3)
    plain, wide = (native._make(images, d, policy, colours=True, level=which) for which in (native.PLAIN, level))
    assert np.array_equal(wide, plain)


def pinned_case(by: int) -> tuple[Decoded, Draws]:
    """An image of whole-number arithmetic, and crops that touch every operation; nothing here may ever change."""
    y, x, c = np.ogrid[:61, :83, :3]
    image = ((y * x * 7 + y * 5 + x * 11 + c * 90 + (x * x) // 9) % 256).astype(np.uint8)
    orders = np.array(list(itertools.permutations(range(4))), np.int8)
    steps = np.arange(24)[None]
    aside = steps % by  # so that boxes start and end inside of a pixel, where there is a reduction
    d = Draws(
        top=(by * (steps % 20) + aside).astype(np.int32),
        left=(by * (steps % 30) + (aside * 3) % by).astype(np.int32),
        height=(by * (4 + steps) + (aside * 4) % by).astype(np.int32),
        width=(by * (53 - 2 * steps) - (aside * 2) % by).astype(np.int32),
        flip=steps % 2 == 0,
        jitter=steps % 8 != 0,
        brightness=0.3 + steps / 16,
        contrast=1.7 - steps / 16,
        saturation=0.2 + steps / 13,
        hue=steps / 48 - 0.25,
        order=orders[None],
        grayscale=steps % 5 == 0,
        blur=steps % 3 != 0,
        sigma=0.1 + steps / 10,
        solarize=steps % 7 == 0,
    )
    return Decoded(image, by), d  # type: ignore[arg-type]


@built
@at_each(*LEVELS)
@pytest.mark.parametrize(
    ("flavour", "interpolation", "size", "by", "digest"),
    [
        ("torchvision", "bilinear", 40, 1, "392a599b52df8407965edffd9906651fe0d1d7ed0d7b42fd325bf6e33a0a664a"),
        ("paper", "bicubic", 40, 1, "77e217313490b216411d0c7316ee25fdfd0e401b88407550dffddbfd63b66a3f"),
        ("torchvision", "bicubic", 40, 1, "d3b40501a188abc1ea7a48382462077b6544f0018b9397b42ce0d9ab5ca7b2cb"),
        ("torchvision", "bicubic", 17, 1, "c01372f586fc606eded4c2ff88bedb0b6053a5920dd77309abb51069366ee552"),
        ("torchvision", "bilinear", 17, 2, "c0f783be9f16dcf7564119973628c594eb1e9ec6402ba369288ac7caa5cf296f"),
        ("torchvision", "bilinear", 40, 4, "aa56020a4db2f24669d4bc28831359df6d36eef775588534748025461bcf6d97"),
        ("torchvision", "bilinear", 17, 8, "52e7830b1bbab10fc02e3489db3a91ff7450b57634b7e9cfc761941ff3d360cb"),
        ("torchvision", "bicubic", 17, 2, "7a4d15ef6d7823c4548a11b2e5c23822997767ef1d1bc3fbec5f0b6d95949845"),
        ("torchvision", "bicubic", 40, 4, "f53bb887a7027b20160682eb6edac0d88ab7d563d85dd82ba2fbe417a8e3490f"),
        ("torchvision", "bicubic", 17, 8, "f3b75c88058dc97972d7acad838b4ec1e5552bfc14d3dbed0a4e18e3fa47113b"),
    ],
)
def test_the_bytes_are_those_of_any_machine(flavour, interpolation, size: int, by: int, digest: str, level: int):
    """Whoever sees this fail: views are not what they were, on this machine or since the last change."""
    image, d = pinned_case(by)
    policy = preset("imagenet-broad", size=size, flavour=flavour).model_copy(update={"interpolation": interpolation})
    views = native._make([image], d, policy, colours=True, level=level)
    assert hashlib.sha256(views.tobytes()).hexdigest() == digest


@built
@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 2**40))
def test_views_are_the_same_bytes_in_any_company(sizes, cut: int, first_id: int):
    policy = preset("imagenet-broad", size=36)
    images = images_of(sizes)
    ids = first_id + np.arange(len(images))
    whole = native.two_views(images, draws_for(images, policy, ids=ids), policy)
    for part in (slice(None, cut), slice(cut, None)):
        if images[part]:
            alone = native.two_views(images[part], draws_for(images[part], policy, ids=ids[part]), policy)
            assert np.array_equal(alone, whole[part])


@built
def test_threads_do_not_disturb_each_other():
    policy = preset("imagenet", size=64)
    images = images_of(SIZES, noise)
    d = draws_for(images, policy, views=4)
    alone = native.two_views(images, d, policy)
    with ThreadPoolExecutor(2) as pool:
        for views in pool.map(lambda _: native.two_views(images, d, policy), range(20)):
            assert np.array_equal(views, alone)


@built
def test_images_of_any_strides_are_taken_and_not_changed():
    policy = preset("imagenet", size=30)
    image = noise(50, 60)
    expected = native.two_views([image], draws_for([image], policy), policy)
    before = image.copy()
    image.flags.writeable = False  # as Arrow hands them out
    planar = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
    framed = np.pad(image, ((3, 4), (5, 6), (0, 0)))[3:-4, 5:-6]
    for other in (image, planar, framed, image[::-1][::-1]):
        assert np.array_equal(native.two_views([other], draws_for([image], policy), policy), expected)
    assert np.array_equal(image, before)


@built
def test_views_are_written_where_they_are_wanted_and_nowhere_else():
    policy = preset("imagenet", size=31)
    images = images_of(SIZES)
    d = draws_for(images, policy)
    room = np.full((len(images) + 2, 2, 31, 31, 3), 201, np.uint8)
    views = native.two_views(images, d, policy, out=room[1:-1])
    assert np.shares_memory(views, room)
    assert np.array_equal(views, native.two_views(images, d, policy))
    assert (room[[0, -1]] == 201).all()


@built
def test_no_images_give_no_views():
    policy = preset("cifar")
    nothing = draw(policy, seed=0, epoch=0, sample_ids=np.zeros(0, np.int64), sizes=np.zeros((0, 2), np.int64))
    assert native.two_views([], nothing, policy).shape == (0, 2, 32, 32, 3)


BOXES = [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0), (6, 0, 5, 5), (0, 6, 5, 5), (11, 0, 1, 1)]
HUGE = 2**31 - 1


@built
@pytest.mark.parametrize("box", [*BOXES, (HUGE, 0, HUGE, 5), (0, 5, 5, HUGE), (-HUGE - 1, 0, 5, 5)])
def test_a_crop_outside_its_image_is_refused(box):
    policy = preset("cifar")
    images = [natural(10, 10), natural(10, 10)]
    d = draws_for(images, policy)
    for name, value in zip(("top", "left", "height", "width"), box, strict=True):
        getattr(d, name)[1, 1] = value
    with pytest.raises(ValueError, match="not inside image 1 of"):
        native.crop(images, d, policy)


@built
@pytest.mark.parametrize(
    "changes",
    [
        {"brightness": np.nan},
        {"contrast": np.inf},
        {"saturation": -1e7},
        {"hue": np.nan},
        {"sigma": 0.0, "blur": True},
        {"sigma": -1.0, "blur": True},
        {"order": np.array([0, 1, 2, 2], np.int8)},
        {"order": np.array([0, 1, 2, 4], np.int8)},
        {"order": np.array([-1, 1, 2, 3], np.int8)},
    ],
)
def test_draws_that_no_policy_makes_are_refused(changes):
    policy = preset("imagenet", size=24)
    images = [natural(24, 24)]
    with pytest.raises(ValueError, match=next(iter(changes))):
        native.two_views(images, one(draws_for(images, policy), **changes), policy)


@built
@pytest.mark.parametrize(
    "image", [np.zeros((9, 9, 3)), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9), np.uint8), np.zeros(9, np.uint8)]
)
def test_what_is_no_image_is_refused(image):
    policy = preset("cifar")
    with pytest.raises(ValueError, match="an image is"):
        native.crop([image], draws_for([natural(9, 9)], policy), policy)


@built
def test_empty_images_and_wrong_numbers_of_them_are_refused():
    policy = preset("cifar")
    d = draws_for([natural(9, 9)], policy)
    with pytest.raises(ValueError, match="image 0 of"):
        native.crop([np.zeros((0, 9, 3), np.uint8)], d, policy)
    with pytest.raises(ValueError, match="2 images"):
        native.crop([natural(9, 9)] * 2, d, policy)
    with pytest.raises(ValueError, match="draws of shape"):
        native.crop([natural(9, 9)] * 2, d.flatten(), policy)


@built
@pytest.mark.parametrize("size", [0, 4097])
def test_sizes_of_views_out_of_range_are_refused(size: int):
    policy = preset("cifar").model_copy(update={"size": size})
    with pytest.raises(ValueError, match="views of"):
        native.crop([natural(9, 9)], draws_for([natural(9, 9)], policy), policy)


@built
@pytest.mark.parametrize(
    "out",
    [
        np.zeros((1, 2, 32, 32), np.uint8),
        np.zeros((1, 2, 32, 32, 3), np.int8),
        np.zeros((1, 2, 32, 32, 6), np.uint8)[..., ::2],
        np.broadcast_to(np.uint8(0), (1, 2, 32, 32, 3)),
    ],
)
def test_unfit_room_for_the_views_is_refused(out):
    policy = preset("cifar")
    with pytest.raises(ValueError, match="out:"):
        native.crop([natural(9, 9)], draws_for([natural(9, 9)], policy), policy, out=out)


@built
def test_a_kernel_of_another_version_says_so():
    kernel, _ = native._load()
    job = native._Job(version=native._VERSION + 1, images=1, views=1, size=1, taps=1)
    assert kernel(ctypes.byref(job)) == native._OTHER_VERSION


@built
def test_a_kernel_of_other_source_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    changed = tmp_path / "native.c"
    changed.write_bytes(native._SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    monkeypatch.setattr(native, "_SOURCE", changed)
    assert "another version" in native.why_not()


def test_a_kernel_that_was_not_built_is_not_available_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    for file, reason in ((None, "not built"), (broken, "cannot be loaded")):
        monkeypatch.setattr(native, "_file", lambda file=file: file)
        assert not native.available()
        assert reason in native.why_not()
        with pytest.raises(RuntimeError, match=reason):
            native.two_views([], None, None)


# Runs where the process's memory is watched: every size at which rows, taps or windows end unevenly.
UNDER_WATCH = """
import itertools, sys
from pathlib import Path
import numpy as np
from simclr_ray.data.decode import Decoded
from simclr_ray.views import native
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import preset

native._file = lambda: Path(sys.argv[1])
assert native.available(), native.why_not()
rng = np.random.default_rng(0)
sides = [(1, 1), (1, 9), (9, 1), (2, 3), (7, 5), (16, 33), (64, 64), (301, 40), (45, 500)]
presets = [("torchvision", "bilinear", 1), ("torchvision", "bicubic", 1), ("paper", "bicubic", 1)]
presets += [("torchvision", "bilinear", 2), ("torchvision", "bicubic", 4), ("torchvision", "bilinear", 8)]
for size, (flavour, interpolation, by) in itertools.product((1, 2, 8, 15, 16, 17, 32, 33, 100), presets):
    policy = preset("imagenet-broad", size=size, flavour=flavour)
    policy = policy.model_copy(update={"interpolation": interpolation, "blur_kernel_fraction": 1.0})
    images = [Decoded(rng.integers(0, 256, (-(-h // by), -(-w // by), 3), dtype=np.uint8), by) for h, w in sides]
    sizes = np.array(sides)
    draws = draw(policy, seed=size, epoch=0, sample_ids=np.arange(len(images)), sizes=sizes, views=3)
    draws.sigma[:, 1] *= 4
    draws.height[:, 2], draws.width[:, 2] = sizes.T  # to the last byte of the image
    draws.top[:, 2] = draws.left[:, 2] = 0
    views = [native._make(images, draws, policy, colours=True, level=level) for level in range(3)]
    assert all(np.array_equal(view, views[0]) for view in views)
policy = preset("cifar", size=4096)
image = np.zeros((9, 9, 3), np.uint8)
draws = draw(policy, seed=0, epoch=0, sample_ids=np.zeros(1, np.int64), sizes=np.array([[9, 9]]), views=1)
try:
    native.two_views([image], draws, policy)
except MemoryError:
    print("done, and no room is an error")
"""


def under_watch(source: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The script, run on C code that is built with these sanitizers."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    runtime = Path(subprocess.check_output([compiler, "-print-file-name=libasan.so"], text=True).strip()).resolve()
    if not runtime.is_file():
        pytest.skip("gcc has no address sanitizer here")
    library = folder / "watched.so"
    (folder / "watched.c").write_text(source)
    flags = ["-std=c11", "-g", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, *options, str(folder / "watched.c"), "-o", str(library)], check=True)
    # Scratch memory for views of 4096 pixels is beyond what the sanitizer hands out.
    options = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=150"
    return subprocess.run(
        [sys.executable, "-c", UNDER_WATCH, str(library)],
        env={**os.environ, "LD_PRELOAD": str(runtime), "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_byte_outside_the_arrays_is_touched(tmp_path: Path):
    checks = "-fsanitize=address,undefined,float-cast-overflow"
    done = under_watch(native._SOURCE.read_text(), tmp_path, "-O1", checks, "-fno-sanitize-recover=all")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "done, and no room is an error" in done.stdout


def test_a_byte_beyond_an_array_of_the_scratch_memory_would_be_found(tmp_path: Path):
    """The test above looks between the arrays that share one block, too."""
    right, wrong = (
        "memset(work->black, 0, (size_t)stride * sizeof(float))",
        "memset(work->black, 0, 1 + 4 * (size_t)stride)",
    )
    source = native._SOURCE.read_text()
    assert source.count(right) == 1
    done = under_watch(source.replace(right, wrong), tmp_path, "-O0", "-fsanitize=address")
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr
