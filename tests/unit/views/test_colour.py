from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from simclr_ray.views import colour as module
from simclr_ray.views.colour import colour
from simclr_ray.views.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, draw
from simclr_ray.views.policy import Policy, preset
from tests.unit.views.images import grey_as_rgb, natural

OPERATIONS = {
    BRIGHTNESS: ("brightness", TF.adjust_brightness),
    CONTRAST: ("contrast", TF.adjust_contrast),
    SATURATION: ("saturation", TF.adjust_saturation),
    HUE: ("hue", TF.adjust_hue),
}
ONLY_JITTER = {"jitter_probability": 1.0, "grayscale_probability": 0.0, "blur_probability": 0.0}


def views_of(size: int, n: int) -> torch.Tensor:
    images = [grey_as_rgb(size, size, seed) if seed % 5 == 4 else natural(size, size, seed) for seed in range(n)]
    return torch.from_numpy(np.stack(images))


def draws_for(policy: Policy, n: int, *, seed: int = 3) -> Draws:
    sizes = np.full((n, 2), policy.size)
    return draw(policy, seed=seed, epoch=0, sample_ids=np.arange(n), sizes=sizes, views=1).flatten()


def reference(view: torch.Tensor, d: Draws, policy: Policy) -> torch.Tensor:
    """torchvision on float64, one view (S, S, 3), in levels; `d` is the draw of that view."""
    pixels = view.permute(2, 0, 1).double() / 255
    if d.jitter:
        for operation in d.order.tolist():
            name, adjust = OPERATIONS[operation]
            pixels = adjust(pixels, float(getattr(d, name)))
    if d.grayscale:
        pixels = TF.rgb_to_grayscale(pixels, 3)
    if d.blur:
        pixels = TF.gaussian_blur(pixels, [policy.blur_taps] * 2, [float(d.sigma)] * 2)
    return pixels.permute(1, 2, 0) * 255


def errors(policy: Policy, n: int) -> np.ndarray:
    """Mean absolute error of each view, in levels. Rounding to whole levels alone makes it 0.25."""
    views, d = views_of(policy.size, n), draws_for(policy, n)
    out = colour(views, d, policy)
    assert out.dtype == torch.uint8
    assert out.shape == views.shape
    return np.array([(out[i] - reference(views[i], d[i], policy)).abs().mean() for i in range(n)])


@pytest.mark.parametrize(
    ("policy", "n"),
    [
        (preset("imagenet"), 12),
        (preset("imagenet", size=64), 40),
        (preset("cifar"), 80),
        (preset("cifar", size=28), 80),
    ],
)
def test_the_whole_is_torchvisions(policy: Policy, n: int):
    error = errors(policy, n)
    assert error.mean() <= 1.0
    assert error.max() <= 2.5


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_operation_alone_is_torchvisions(name: str):
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    strengths[name] = 0.5 if name == "hue" else 0.8
    assert errors(Policy(size=40, **{**ONLY_JITTER, **strengths}), 12).max() <= 0.3


def test_two_operations_alone_keep_their_order():
    assert errors(Policy(size=28, saturation=0.0, hue=0.0, **ONLY_JITTER), 40).max() <= 0.3


def test_blur_is_torchvisions():
    policy = Policy(size=96, jitter_probability=0, grayscale_probability=0, blur_probability=1)
    views, d = views_of(96, 12), draws_for(policy, 12)
    out = colour(views, d, policy)
    for i in range(12):
        expected = reference(views[i], d[i], policy)
        assert (out[i] - expected.round()).abs().mean() <= 0.1


@pytest.mark.parametrize(("size", "fraction"), [(5, 1.0), (1, 1.0), (7, 0.9), (224, 0.1)])
def test_blur_leaves_a_flat_view_as_it_is(size: int, fraction: float):
    policy = Policy(size=size, jitter_probability=0, blur_probability=1, grayscale_probability=0)
    policy = policy.model_copy(update={"blur_kernel_fraction": fraction})
    views = torch.full((3, size, size, 3), 77, dtype=torch.uint8)
    assert torch.equal(colour(views, draws_for(policy, 3), policy), views)


def test_blur_weights_are_no_denormal_numbers():
    weights = module._blur_matrix(torch.linspace(0.1, 2, 50)[:, None], 64, 23)
    assert weights[weights > 0].min() > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(50, 64))


def test_grayscale_is_torchvisions_exactly():
    policy = Policy(size=32, jitter_probability=0, grayscale_probability=1, blur_probability=0)
    views = views_of(32, 4)
    expected = TF.rgb_to_grayscale(views.permute(0, 3, 1, 2).double(), 3).round().permute(0, 2, 3, 1)
    assert torch.equal(colour(views, draws_for(policy, 4), policy), expected.to(torch.uint8))


def test_nothing_drawn_changes_nothing():
    policy = Policy(size=32, jitter_probability=0, grayscale_probability=0, blur_probability=0)
    views = views_of(32, 4)
    assert torch.equal(colour(views, draws_for(policy, 4), policy), views)


def test_neutral_factors_change_nothing():
    policy = Policy(size=32, **ONLY_JITTER)
    d, ones = draws_for(policy, 6), np.ones(6)
    d = replace(d, brightness=ones, contrast=ones, saturation=ones, hue=0 * ones)
    views = views_of(32, 6)
    assert torch.equal(colour(views, d, policy), views)


def test_a_whole_turn_of_the_hue_changes_nothing():
    policy = Policy(size=32, **ONLY_JITTER)
    d, ones = draws_for(policy, 4), np.ones(4)
    d = replace(d, brightness=ones, contrast=ones, saturation=ones, hue=-ones)
    views = views_of(32, 4)
    assert (colour(views, d, policy).int() - views.int()).abs().max() <= 1


def test_the_order_is_each_views_own():
    policy = Policy(size=32, hue=0.2, **ONLY_JITTER)
    views = views_of(32, 1).expand(2, -1, -1, -1)
    d = draws_for(policy, 1)[np.zeros(2, dtype=int)]
    order = np.array([[BRIGHTNESS, CONTRAST, SATURATION, HUE], [HUE, SATURATION, CONTRAST, BRIGHTNESS]], dtype=np.int8)
    d = replace(d, order=order, brightness=np.full(2, 1.8), contrast=np.full(2, 0.3))
    out = colour(views, d, policy)
    assert (out[0].int() - out[1].int()).abs().float().mean() > 3
    for i in range(2):
        assert (out[i] - reference(views[i], d[i], policy)).abs().mean() <= 0.3


def test_blocks_and_slices_do_not_show(monkeypatch: pytest.MonkeyPatch):
    policy = preset("imagenet", size=48)
    views, d = views_of(48, 20), draws_for(policy, 20)
    together = colour(views, d, policy)
    monkeypatch.setattr(module, "_ALONE_VALUES", 1)
    alone = colour(views, d, policy)
    assert (together.int() - alone.int()).abs().max() <= 1
    assert (together != alone).float().mean() < 1e-3


def test_views_are_not_changed():
    policy = preset("imagenet", size=32)
    views = views_of(32, 8)
    before = views.clone()
    colour(views, draws_for(policy, 8), policy)
    assert torch.equal(views, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees_with_the_cpu():
    policy = preset("imagenet", size=96)
    views, d = views_of(96, 16), draws_for(policy, 16)
    there = colour(views.cuda(), d, policy)
    assert there.is_cuda
    difference = (there.cpu().int() - colour(views, d, policy).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-2
