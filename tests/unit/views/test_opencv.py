"""Laws of the views by OpenCV: they are the torch twin's but for rounding, and stand in where the kernel is not."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.data.decode import Decoded
from simclr_ray.views import apply, make, native, opencv
from simclr_ray.views.draw import Draws
from simclr_ray.views.policy import Policy, preset
from tests.unit.views.images import grey_as_rgb, natural
from tests.unit.views.test_colour import REFERENCES
from tests.unit.views.test_native import SIZES, draws_for, images_of, noise, one, policies

ROOT = Path(__file__).parents[3]
FLAVOURS = ["torchvision", "paper"]
JITTER = {"brightness": 1.8, "contrast": 1.7, "saturation": 1.8, "hue": 0.1537}

installed = pytest.mark.skipif(not opencv.available(), reason=opencv.why_not())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As the product computes; on a busy machine, several threads wait for each other many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def differences(images, draws: Draws, policy: Policy) -> np.ndarray:
    """From the twin's finished views, in levels."""
    ours = opencv.two_views(images, draws, policy)
    theirs = apply.two_views(images, draws, policy)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs)


def whole(images, policy: Policy, **changes) -> Draws:
    """Draws of which each crop is the whole of its image, and of the changes."""
    side = {"top": 0, "left": 0, "height": policy.size, "width": policy.size, "flip": False}
    return one(draws_for(images, policy), **side, **changes)


@installed
@pytest.mark.parametrize("kind", [natural, noise])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("name", "size"), [("imagenet-broad", 224), ("imagenet", 64), ("cifar", 32), ("cifar", 28)])
def test_views_are_the_twins_but_for_rounding(name, size: int, flavour, kind):
    policy = preset(name, size=size, flavour=flavour)
    images = images_of(SIZES, kind) * 2
    difference = differences(images, draws_for(images, policy), policy)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 2e-3


@installed
@settings(max_examples=100, deadline=None)
@given(policies(), st.lists(st.sampled_from(SIZES), min_size=1, max_size=3), st.integers(0, 2**40), st.booleans())
def test_views_of_any_policy_are_within_a_level_of_the_twins(policy: Policy, sizes, seed: int, noisy: bool):
    images = images_of(sizes, noise if noisy else natural)
    assert differences(images, draws_for(images, policy, seed=seed), policy).max() <= 1


@installed
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("name", "size"), [("imagenet-broad", 96), ("imagenet", 64), ("cifar", 32)])
def test_views_are_those_of_float64_but_for_rounding(name, size: int, flavour):
    policy = preset(name, size=size, flavour=flavour)
    images = [natural(size, size, seed) for seed in range(12)]
    draws = whole(images, policy)
    views, each = opencv.two_views(images, draws, policy), draws.flatten()
    gaps = []
    for i, view in enumerate(views.reshape(-1, size, size, 3)):
        exact = REFERENCES[flavour](torch.from_numpy(images[i // 2]), each[i], policy)
        gap = (torch.from_numpy(view) - exact).abs()
        # As of the twin: rounding, and at the threshold of solarize, by which a value jumps by a level.
        assert gap.max() <= (1.6 if each.solarize[i] else 0.6)
        gaps.append(gap.mean())
    assert np.mean(gaps) <= 0.27  # rounding is 0.25, whoever does it
    assert max(gaps) <= 0.35


@installed
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("operation", JITTER)
@pytest.mark.parametrize("factor", ["least", "much"])
def test_each_operation_alone_is_the_twins(operation: str, factor: str, flavour):
    strengths = dict.fromkeys(JITTER, 0.0) | {operation: 0.5 if operation == "hue" else 0.9}
    policy = preset("imagenet", size=40, flavour=flavour).model_copy(update=strengths)
    least = -0.5 if operation == "hue" else 0.0
    images = [natural(40, 40), noise(40, 40), grey_as_rgb(40, 40)]
    plain = {"jitter": True, "grayscale": False, "blur": False}
    draws = whole(images, policy, **plain, **{operation: least if factor == "least" else JITTER[operation]})
    views = opencv.two_views(images, draws, policy)
    assert (views[0] != images[0]).mean() > 0.5
    difference = differences(images, draws, policy)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 2e-3


@installed
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_all_orders_of_the_jitter_are_the_twins(flavour):
    policy = preset("imagenet", size=28, flavour=flavour)
    images = [natural(28, 28), noise(40, 30), grey_as_rgb(28, 28)]
    orders = np.array(list(itertools.permutations(range(4))), np.int8)
    draws = draws_for(images, policy, views=len(orders))
    draws = one(draws, jitter=True, grayscale=False, blur=False, order=orders, **JITTER)
    views = opencv.two_views(images, draws, policy)
    assert len(np.unique(views[0].reshape(len(orders), -1), axis=0)) > 8
    difference = differences(images, draws, policy)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 2e-3


@installed
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.6, 1.0, 2.0, 3.0, 20.0])
@pytest.mark.parametrize(("size", "fraction"), [(1, 1.0), (5, 1.0), (7, 0.9), (33, 1.0), (96, 0.3)])
def test_blur_is_the_twins(size: int, fraction: float, sigma: float, grayscale: bool, flavour):
    policy = preset("imagenet", size=size, flavour=flavour).model_copy(update={"blur_kernel_fraction": fraction})
    images = [noise(size, size), natural(size, size)]
    draws = whole(images, policy, jitter=False, grayscale=grayscale, blur=True, sigma=sigma)
    assert differences(images, draws, policy).max() <= 1


@installed
@pytest.mark.parametrize("grayscale", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 10.0, 200.5, 255.0])
def test_solarize_is_the_twins(threshold: float, grayscale: bool):
    policy = preset("imagenet-broad", size=64).model_copy(update={"solarize_threshold": threshold})
    images = images_of([(64, 64), (64, 64)])
    draws = whole(images, policy, jitter=False, grayscale=grayscale, blur=False, solarize=True)
    # A grey that float32 puts on the other side of the threshold is inverted; without grayscale nothing is computed.
    assert (differences(images, draws, policy) > 0).mean() <= (1e-3 if grayscale else 0)


COLOURS = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 0, 255), (1, 0, 0), (255, 254, 255)]


@installed
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("size", [1, 2, 9])
def test_pixels_without_colour_and_at_the_ends_of_the_scale(size: int, colour, flavour):
    """Where hue and saturation are 0 by 0, and where every clip meets its edge; views smaller than a register."""
    policy = preset("imagenet-broad", size=size, flavour=flavour).model_copy(update={"blur_kernel_fraction": 1.0})
    images = [np.full((size, size, 3), colour, np.uint8)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        changes = {"order": np.array(order, np.int8), "jitter": True, "grayscale": False, "blur": False, **JITTER}
        assert differences(images, whole(images, policy, **changes), policy).max() <= 1
    grey = whole(images, policy, jitter=False, grayscale=True, blur=True, sigma=1.0)
    assert differences(images, grey, policy).max() <= 1


@installed
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_drawn_gives_the_image_and_a_flip_its_mirror_image(flavour):
    policy = preset("imagenet", size=37, flavour=flavour)
    image = noise(37, 37)
    draws = whole([image], policy, jitter=False, grayscale=False, blur=False)
    assert np.array_equal(opencv.two_views([image], draws, policy)[0, 0], image)
    assert np.array_equal(opencv.two_views([image], one(draws, flip=True), policy)[0, 0], image[:, ::-1])
    neutral = one(draws, jitter=True, brightness=1, contrast=1, saturation=1, hue=0)
    assert np.array_equal(opencv.two_views([image], neutral, policy)[0, 0], image)
    for turn in (-1, 1):
        turned = opencv.two_views([image], replace(neutral, hue=neutral.hue + turn), policy)[0, 0]
        assert np.array_equal(turned, image)


@installed
@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 2**40))
def test_views_are_the_same_bytes_in_any_company(sizes, cut: int, first_id: int):
    policy = preset("imagenet-broad", size=36)
    images = images_of(sizes)
    ids = first_id + np.arange(len(images))
    together = opencv.two_views(images, draws_for(images, policy, ids=ids), policy)
    for part in (slice(None, cut), slice(cut, None)):
        if images[part]:
            alone = opencv.two_views(images[part], draws_for(images[part], policy, ids=ids[part]), policy)
            assert np.array_equal(alone, together[part])


@installed
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", [natural, noise])
def test_crops_are_the_twins_bytes_of_reduced_images_too(kind, interpolation: str):
    policy = Policy(size=32, interpolation=interpolation)
    full = [kind(200, 300, 1), kind(90, 61, 2), kind(301, 203, 3), kind(513, 64, 4), kind(7, 9, 5)]
    images = [Decoded(image[::k, ::k].copy(), k) for image, k in zip(full, (2, 1, 4, 8, 2), strict=True)]
    images[1] = full[1]
    draws = draws_for(full, policy, views=5)
    draws.height[:, 4], draws.width[:, 4] = np.array([image.shape[:2] for image in full]).T  # to the last pixel
    draws.top[:, 4] = draws.left[:, 4] = 0
    draws.flip[:, 0], draws.flip[:, 1] = False, True
    assert np.array_equal(opencv.crop(images, draws, policy), apply.crop(images, draws, policy))
    assert np.array_equal(make.crop(images, draws, policy), apply.crop(images, draws, policy))
    assert differences(images, draws, policy).max() <= 1


@installed
@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, -1, 5, 5), (16, 0, 5, 5), (0, 16, 5, 5)])
def test_a_crop_outside_a_reduced_image_is_refused(box):
    policy = preset("cifar")
    draws = draws_for([natural(20, 20)], policy)
    for name, value in zip(("top", "left", "height", "width"), box, strict=True):
        getattr(draws, name)[0, 1] = value
    with pytest.raises(AssertionError):
        opencv.crop([Decoded(natural(10, 10), 2)], draws, policy)


@installed
def test_images_are_not_changed_and_need_not_be_writable():
    policy = preset("imagenet", size=30)
    image = noise(50, 60)
    before = image.copy()
    image.flags.writeable = False  # as Arrow hands them out
    assert differences([image], draws_for([image], policy), policy).max() <= 1
    assert np.array_equal(image, before)


@installed
@pytest.mark.parametrize("threads", [1, 3])
def test_calls_at_once_do_not_disturb_each_other_nor_the_programs_number_of_threads(threads: int):
    import cv2

    policy = preset("imagenet", size=64)
    images = images_of(SIZES, noise)
    draws = draws_for(images, policy, views=4)
    alone = opencv.two_views(images, draws, policy)
    before = cv2.getNumThreads()
    cv2.setNumThreads(threads)
    try:
        with ThreadPoolExecutor(3) as pool:
            for views in pool.map(lambda _: opencv.two_views(images, draws, policy), range(12)):
                assert np.array_equal(views, alone)
        assert cv2.getNumThreads() == threads
        with pytest.raises(AssertionError):
            opencv.two_views(images[:1], draws, policy)
        assert cv2.getNumThreads() == threads
    finally:
        cv2.setNumThreads(before)


@installed
def test_the_threads_are_put_back_by_the_last_call_alone():
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        first, second = opencv._ONE_THREAD.of(cv2), opencv._ONE_THREAD.of(cv2)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert cv2.getNumThreads() == 1
        second.__exit__(None, None, None)
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


@installed
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 50.0])
def test_the_blurs_weights_are_a_gaussians_but_for_dust(sigma: float):
    offsets = np.arange(-11, 12)
    exact = np.exp(-0.5 * (offsets / sigma) ** 2)
    exact /= exact.sum()
    weights = opencv._gaussian(sigma, 11)
    cut = (23 - len(weights)) // 2
    assert exact.sum() - exact[cut : 23 - cut].sum() <= 2e-4
    np.testing.assert_allclose(weights, exact[cut : 23 - cut], rtol=3e-4)
    assert abs(weights.sum(dtype=np.float64) - 1) <= 1e-6


def without(monkeypatch: pytest.MonkeyPatch, *modules) -> None:
    """As where these have nothing to load."""
    for module in modules:
        reason = f"no {module.__name__.rpartition('.')[2]} here"
        monkeypatch.setattr(module, "_load", lambda reason=reason: (None, reason))


def test_the_best_maker_at_hand_is_taken_and_named(monkeypatch: pytest.MonkeyPatch):
    policy = preset("imagenet", size=48)
    images = images_of([(60, 50), (48, 90)])
    draws = draws_for(images, policy)
    if native.available():
        assert np.array_equal(make.two_views(images, draws, policy), native.two_views(images, draws, policy))
        assert make.how_views_are_made("cpu").endswith("by the C kernel")
        assert make.how_views_are_made("gpu").endswith("by the C kernel")
        assert make.maker() == "kernel"
    without(monkeypatch, native)
    if opencv.available():
        assert np.array_equal(make.two_views(images, draws, policy), opencv.two_views(images, draws, policy))
        assert make.how_views_are_made("cpu").endswith("by OpenCV (no native here)")
        assert make.maker() == "opencv"
        assert np.array_equal(make.crop(images, draws, policy), opencv.crop(images, draws, policy))
    without(monkeypatch, native, opencv)
    assert np.array_equal(make.two_views(images, draws, policy), apply.two_views(images, draws, policy))
    assert make.how_views_are_made("cpu").endswith("by torch, slowly (no native here; no opencv here)")
    assert make.maker() == "torch"
    assert np.array_equal(make.crop(images, draws, policy), apply.crop(images, draws, policy))
    with pytest.raises(RuntimeError, match="no opencv here"):
        opencv.two_views(images, draws, policy)
    with pytest.raises(RuntimeError, match="no opencv here"):
        opencv.crop(images, draws, policy)


@pytest.mark.parametrize("content", ["raise ImportError('libGL.so.1: no such file')", ""])
def test_a_broken_opencv_is_not_used_and_says_why(content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cv2.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.setattr(opencv, "_load", opencv._load.__wrapped__)
    assert not opencv.available()
    assert "cannot be imported: " in opencv.why_not()


# What a wheel has to do where it was built without a compiler: started in a folder that is not the repository's.
IN_A_WHEEL = """
import sys
import numpy as np, simclr_ray
from simclr_ray.views import apply, make, native, opencv
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import preset

assert simclr_ray.__file__.startswith(sys.argv[1]), simclr_ray.__file__
assert "cv2" not in sys.modules  # imported when it is needed, which it is not where there is a kernel
assert not native.available() and "not built" in native.why_not()
policy = preset("imagenet", size=32)
images = [np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)]
draws = draw(policy, seed=0, epoch=0, sample_ids=np.zeros(1, np.int64), sizes=np.array([[40, 50]]))
views = make.two_views(images, draws, policy).astype(int)
assert np.abs(views - apply.two_views(images, draws, policy)).max() <= 1
assert ("cv2" in sys.modules) == opencv.available()
print(make.how_views_are_made("cpu"))
"""


def test_a_wheel_built_without_a_compiler_has_no_kernel_and_works(tmp_path: Path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools to build with")
    source, site = tmp_path / "source", tmp_path / "site"
    skipped = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "simclr_ray", source / "simclr_ray", ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    no_compiler = {**os.environ, "CC": "false", "OMP_NUM_THREADS": "1"}
    run = {"env": no_compiler, "capture_output": True, "text": True, "check": False}
    built = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, **run)
    assert built.returncode == 0, built.stderr[-4000:]
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        wheel.extractall(site)
    assert "simclr_ray/views/opencv.py" in names
    assert not [name for name in names if name.startswith("simclr_ray/views/_native")]
    run["env"] = {**no_compiler, "PYTHONPATH": str(site)}
    used = subprocess.run([sys.executable, "-c", IN_A_WHEEL, str(site)], cwd=tmp_path, **run)
    assert used.returncode == 0, used.stderr[-4000:]
    assert "the kernel was not built" in used.stdout
