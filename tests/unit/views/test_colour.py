from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_ray.views import colour as module
from simclr_ray.views.colour import colour
from simclr_ray.views.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, draw
from simclr_ray.views.policy import Flavour, Policy, preset
from tests.unit.views import google
from tests.unit.views.images import grey_as_rgb, natural

OPERATIONS = {
    BRIGHTNESS: ("brightness", TF.adjust_brightness),
    CONTRAST: ("contrast", TF.adjust_contrast),
    SATURATION: ("saturation", TF.adjust_saturation),
    HUE: ("hue", TF.adjust_hue),
}
NAMES = {operation: name for operation, (name, _) in OPERATIONS.items()}
ONLY_JITTER = {"jitter_probability": 1.0, "grayscale_probability": 0.0, "blur_probability": 0.0}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As the product computes; on a busy machine, several threads wait for each other many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    if d.solarize:
        pixels = TF.solarize(pixels, policy.solarize_threshold / 255)
    return pixels.permute(1, 2, 0) * 255


def papers_reference(view: torch.Tensor, d: Draws, policy: Policy) -> torch.Tensor:
    """Google's formulas on float64, as `reference`."""
    pixels = view.double().numpy() / 255
    if d.jitter:
        for operation in d.order.tolist():
            name = NAMES[operation]
            if getattr(policy, name) > 0:
                pixels = google.clip(getattr(google, name)(pixels, float(getattr(d, name))))
    if d.grayscale:
        pixels = google.grayscale(pixels)
    if d.blur:
        pixels = google.clip(google.blur(pixels, float(d.sigma), policy.size))
    if d.solarize:
        pixels = google.solarize(pixels, policy.solarize_threshold / 255)
    return torch.from_numpy(pixels * 255)


REFERENCES = {"torchvision": reference, "paper": papers_reference}


def errors(policy: Policy, n: int) -> np.ndarray:
    """Mean absolute error of each view, in levels. Rounding to whole levels alone makes it 0.25.

    No value may be off by more than rounding (0.5) and the last bits of float32 make it, or, where a view is
    solarized, by the one level by which a value jumps at the threshold.
    """
    views, d = views_of(policy.size, n), draws_for(policy, n)
    out = colour(views, d, policy)
    assert out.dtype == torch.uint8
    assert out.shape == views.shape
    gaps = [(out[i] - REFERENCES[policy.flavour](views[i], d[i], policy)).abs() for i in range(n)]
    for i, gap in enumerate(gaps):
        assert gap.max() <= (1.51 if d.solarize[i] else 0.51), (i, d[i])
    return np.array([gap.mean() for gap in gaps])


@pytest.mark.parametrize(
    ("policy", "n"),
    [
        (preset("imagenet"), 12),
        (preset("imagenet", size=64), 40),
        (preset("cifar"), 80),
        (preset("cifar", size=28), 80),
        (preset("imagenet-broad", size=64), 40),
        (preset("imagenet", size=224, flavour="paper"), 3),
        (preset("imagenet-broad", size=40, flavour="paper"), 40),
        (preset("cifar", flavour="paper"), 40),
    ],
)
def test_the_whole_is_that_of_its_flavour(policy: Policy, n: int):
    error = errors(policy, n)
    assert error.mean() <= 0.27  # 0.25 is rounding; views with saturated values have less
    assert error.max() <= 0.35


@pytest.mark.parametrize("flavour", REFERENCES)
@pytest.mark.parametrize("name", NAMES.values())
def test_each_operation_alone_is_that_of_its_flavour(name: str, flavour: Flavour):
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    strengths[name] = 0.5 if name == "hue" else 0.8
    policy = preset("imagenet", size=40, flavour=flavour).model_copy(update={**ONLY_JITTER, **strengths})
    assert errors(policy, 12).max() <= 0.3


# What TensorFlow 2.21 makes of eight pixels (two rows): tf.image.<operation>(pixels / 255, factor) * 255, clipped.
PIXELS = [[0, 37, 148], [82, 90, 172], [77, 56, 109], [236, 186, 210]]
PIXELS += [[57, 229, 224], [42, 185, 151], [191, 54, 242], [2, 87, 246]]
TENSORFLOW = {
    ("contrast", 1.7): [
        *([0.0, 0.0, 120.18], [79.29, 72.15, 160.98], [70.79, 14.35, 53.88], [255.0, 235.35, 225.57]),
        *([36.79, 255.0, 249.38], [11.29, 233.65, 125.28], [255.0, 10.95, 255.0], [0.0, 67.05, 255.0]),
    ],
    ("saturation", 1.8): [
        *([0.0, 37.0, 148.0], [10.0, 24.4, 172.0], [51.4, 13.6, 109.0], [236.0, 146.0, 189.2]),
        *([0.0, 229.0, 222.34], [0.0, 185.0, 141.01], [176.35, 0.0, 242.0], [0.0, 85.7, 246.0]),
    ],
    ("saturation", 0.3): [
        *([103.6, 114.7, 148.0], [145.0, 147.4, 172.0], [99.4, 93.1, 109.0], [236.0, 221.0, 228.2]),
        *([177.4, 229.0, 227.5], [142.1, 185.0, 174.8], [226.7, 185.6, 242.0], [172.8, 198.3, 246.0]),
    ],
    ("hue", 0.15): [
        *([96.2, 0.0, 148.0], [155.0, 82.0, 172.0], [109.0, 56.0, 93.3], [236.0, 207.0, 186.0]),
        *([57.0, 79.2, 229.0], [42.0, 90.3, 185.0], [242.0, 54.0, 123.8], [136.6, 2.0, 246.0]),
    ],
}


@pytest.mark.parametrize(("name", "factor"), TENSORFLOW)
def test_the_papers_operations_are_tensorflows(name: str, factor: float):
    expected = torch.tensor(TENSORFLOW[name, factor])
    # The reference of these tests first, then the product.
    theirs = google.clip(getattr(google, name)(np.array(PIXELS).reshape(2, 4, 3) / 255, factor)) * 255
    torch.testing.assert_close(torch.from_numpy(theirs).view(8, 3).float(), expected, atol=0.01, rtol=0)
    operate = {"contrast": module.contrast_of_channels, "saturation": module.saturation_in_hsv, "hue": module.hue}[name]
    pixels = torch.tensor(PIXELS, dtype=torch.float32).T.reshape(1, 3, 2, 4).contiguous()
    operate(pixels, torch.tensor(factor).view(1, 1, 1, 1))
    torch.testing.assert_close(pixels.view(3, 8).T, expected, atol=0.01, rtol=0)


def test_flavours_differ_where_they_should():
    # Contrast and saturation each move a view by some levels in the mean; without them there is no difference.
    views = views_of(48, 20)
    for update, least in (({"saturation": 0.0}, 2), ({"contrast": 0.0}, 2), ({"contrast": 0.0, "saturation": 0.0}, 0)):
        policy = Policy(size=48, **ONLY_JITTER).model_copy(update={"hue": 0.0, "brightness": 0.0, **update})
        d = draws_for(policy, 20)
        paper = policy.model_copy(update={"flavour": "paper"})
        gap = (colour(views, d, policy).float() - colour(views, d, paper).float()).abs().mean()
        assert gap >= least
        assert least or gap == 0


@pytest.mark.parametrize(
    "pixel", [[0, 0, 0], [255, 255, 255], [128, 128, 128], [1, 0, 0], [255, 254, 255], [0, 0, 255]]
)
@pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.8, 4.0])
def test_saturation_in_hsv_at_the_corners(pixel: list[int], factor: float):
    pixels = torch.tensor(pixel, dtype=torch.float32).view(1, 3, 1, 1)
    expected = google.saturation(np.array(pixel).reshape(1, 1, 3) / 255, factor) * 255
    module.saturation_in_hsv(pixels, torch.tensor(factor).view(1, 1, 1, 1))
    np.testing.assert_allclose(pixels.flatten().numpy(), expected.ravel(), atol=1e-4)


def test_two_operations_alone_keep_their_order():
    assert errors(Policy(size=28, saturation=0.0, hue=0.0, **ONLY_JITTER), 40).max() <= 0.3


def test_blur_is_torchvisions():
    policy = Policy(size=96, jitter_probability=0, grayscale_probability=0, blur_probability=1)
    views, d = views_of(96, 12), draws_for(policy, 12)
    out = colour(views, d, policy)
    for i in range(12):
        expected = reference(views[i], d[i], policy)
        assert (out[i] - expected.round()).abs().mean() <= 0.1


def test_the_papers_blur_is_googles():
    policy = preset("imagenet", flavour="paper", size=96)
    policy = policy.model_copy(update={"jitter_probability": 0, "grayscale_probability": 0, "blur_probability": 1})
    views, d = views_of(96, 12), draws_for(policy, 12)
    out = colour(views, d, policy)
    for i in range(12):
        assert (out[i] - papers_reference(views[i], d[i], policy).round()).abs().mean() <= 0.1
    # Black comes in from beyond the edge, and no further than the kernel reaches.
    white = torch.full((1, 96, 96, 3), 255, dtype=torch.uint8)
    out = colour(white, replace(d[:1], sigma=np.array([2.0])), policy)[0]
    assert out[0, 0].max() < out[0, 48].max() < out[1, 48].max() < 255
    assert (out[4:-4, 4:-4] == 255).all()  # 9 taps at 96 px


@pytest.mark.parametrize("threshold", [128.0, 0.0, 40.0, 255.0])
def test_solarize_is_torchvisions_exactly(threshold: float):
    policy = Policy(size=32, jitter_probability=0, grayscale_probability=0, blur_probability=0, solarize_probability=1)
    policy = policy.model_copy(update={"solarize_threshold": threshold})
    views = views_of(32, 4)
    out = colour(views, draws_for(policy, 4), policy)
    assert torch.equal(out, TF.solarize(views.permute(0, 3, 1, 2), threshold).permute(0, 2, 3, 1))


def test_solarize_comes_last():
    # BYOL's order (arXiv 2006.07733, appendix B): jitter, grayscale, blur, solarize.
    policy = Policy(size=32, jitter_probability=0, grayscale_probability=1, blur_probability=1, solarize_probability=1)
    views, d = views_of(32, 6), draws_for(policy, 6)
    out = colour(views, d, policy)
    before = colour(views, replace(d, solarize=np.zeros(6, dtype=bool)), policy)
    assert before.max() > 200
    expected = TF.solarize(before.permute(0, 3, 1, 2), 128).permute(0, 2, 3, 1)
    assert (out.int() - expected.int()).abs().max() <= 1  # theirs rounds before it compares


@pytest.mark.parametrize(("size", "fraction"), [(5, 1.0), (1, 1.0), (7, 0.9), (224, 0.1)])
def test_blur_leaves_a_flat_view_as_it_is(size: int, fraction: float):
    policy = Policy(size=size, jitter_probability=0, blur_probability=1, grayscale_probability=0)
    policy = policy.model_copy(update={"blur_kernel_fraction": fraction})
    views = torch.full((3, size, size, 3), 77, dtype=torch.uint8)
    assert torch.equal(colour(views, draws_for(policy, 3), policy), views)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_blur_is_exact_whatever_products_the_program_allows(device: str):
    # At 224 pixels a CPU has other products too; TF32 ones would be off by up to 0.1 levels.
    views = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)).mul_(255).to(device)
    sigma = torch.linspace(0.5, 2, 4, device=device).view(4, 1, 1, 1)

    def blurred() -> torch.Tensor:
        pixels = views.clone()
        module.blur(pixels, sigma, taps=23)
        return pixels

    expected = blurred()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        reduced = blurred()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = blurred()
    assert torch.equal(reduced, expected)
    assert torch.equal(cast, expected)


class Crossings(TorchDispatchMode):
    """Counts the operations that take a tensor from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [part for part in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        made = [part for part in torch.utils._pytree.tree_leaves(out) if isinstance(part, torch.Tensor)]
        if any(part.device.type != "cpu" for part in (*tensors, *made)):
            self.sizes += [part.numel() for part in tensors if part.device.type == "cpu"]
        return out


@pytest.mark.parametrize("flavour", REFERENCES)
def test_parameters_go_to_a_device_in_one_copy(flavour: Flavour):
    # Each copy of ordinary memory is a moment in which the host waits for a GPU. "meta" is a device without pixels, and
    # without autocast, which a blur switches off: only its matrices are made there.
    policy = preset("imagenet-broad", size=32, flavour=flavour)
    views, d = views_of(32, 40).to("meta"), draws_for(policy, 40)
    with Crossings() as crossings:
        colour(views, replace(d, blur=np.zeros(40, dtype=bool)), policy)
    assert len(crossings.sizes) == 1
    with Crossings() as crossings:
        module._blur_matrix(torch.ones(40, 1, device="meta"), 32, 5, reflect=flavour == "torchvision")
    assert not crossings.sizes


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


@pytest.mark.parametrize("flavour", REFERENCES)
@pytest.mark.parametrize(("size", "n"), [(32, 100), (96, 20), (160, 6)])
def test_one_at_a_time_in_blocks_and_all_at_once_agree(
    flavour: Flavour, size: int, n: int, monkeypatch: pytest.MonkeyPatch
):
    # The stated bound: one level a value, and hardly ever. All at once is how a GPU computes.
    policy = preset("imagenet-broad", size=size, flavour=flavour)
    views, d = views_of(size, n), draws_for(policy, n)
    alone = torch.cat([colour(views[i : i + 1], d[i : i + 1], policy) for i in range(n)])
    in_blocks = colour(views, d, policy)
    monkeypatch.setattr(module, "_views_per_block", len)
    at_once = colour(views, d, policy)
    for other in (in_blocks, at_once):
        assert (other.int() - alone.int()).abs().max() <= 1
        assert (other != alone).float().mean() < 1e-4


def test_views_are_not_changed():
    policy = preset("imagenet", size=32)
    views = views_of(32, 8)
    before = views.clone()
    colour(views, draws_for(policy, 8), policy)
    assert torch.equal(views, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flavour", REFERENCES)
def test_the_gpu_agrees_with_the_cpu(flavour: Flavour):
    policy = preset("imagenet-broad", size=96, flavour=flavour)
    views, d = views_of(96, 40), draws_for(policy, 40)
    there = colour(views.cuda(), d, policy)
    assert there.is_cuda
    difference = (there.cpu().int() - colour(views, d, policy).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-2
