"""How far views are from torchvision's arithmetic in float64, given the same parameters: ours, Pillow's, and tensors'.

Operations alone and the whole view, each from 8-bit pixels that all have in common. The reference is rounded nowhere:
whoever rounds once, to whole levels, is off by 0.25 in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision.transforms.functional as v1
import torchvision.transforms.v2.functional as v2
from PIL import Image, ImageFilter
from views_photos import CASES, Case, Photos, encoded_crops
from views_pipelines import NotRun, need

from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.views import apply, native, opencv
from simclr_ray.views.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, draw
from simclr_ray.views.policy import Policy, PresetName, preset

Levels = npt.NDArray[np.generic]
Maker = Callable[[Levels, Draws, Policy], Levels]
"""One view (S, S, 3), in levels of 255, of one image (H, W, 3) uint8; the draws are of shape (1, 1)."""
ADJUST = {
    BRIGHTNESS: ("brightness", "adjust_brightness"),
    CONTRAST: ("contrast", "adjust_contrast"),
    SATURATION: ("saturation", "adjust_saturation"),
    HUE: ("hue", "adjust_hue"),
}


def ours(image: Levels, draws: Draws, policy: Policy) -> Levels:
    need("kernel")
    return native.two_views([image], draws, policy)[0, 0]


def ours_by_opencv(image: Levels, draws: Draws, policy: Policy) -> Levels:
    need("OpenCV")
    return opencv.two_views([image], draws, policy)[0, 0]


def ours_by_torch(image: Levels, draws: Draws, policy: Policy) -> Levels:
    return apply.two_views([image], draws, policy)[0, 0]


def float64(image: Levels, draws: Draws, policy: Policy) -> Levels:
    pixels = _distort(v1, torch.from_numpy(image).permute(2, 0, 1).double() / 255, draws, policy)
    return 255 * pixels.permute(1, 2, 0).numpy()


def by_pillow(image: Levels, draws: Draws, policy: Policy) -> Levels:
    """torchvision v1 and lightly."""
    return np.asarray(_distort(v1, Image.fromarray(image), draws, policy))


def by_tensors(image: Levels, draws: Draws, policy: Policy) -> Levels:
    """torchvision v2."""
    return _distort(v2, torch.from_numpy(image).permute(2, 0, 1), draws, policy).permute(1, 2, 0).numpy()


def linear_by_opencv(image: Levels, draws: Draws, policy: Policy) -> Levels:
    """The resize of AlbumentationsX by default: linear, no antialiasing."""
    try:
        import cv2
    except ImportError as error:
        raise NotRun(f"not installed ({error})") from error
    top, left, height, width = _box(draws)
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    return cv2.resize(crop, (policy.size, policy.size), interpolation=cv2.INTER_LINEAR)


MAKERS: dict[str, Maker] = {
    "ours": ours,
    "ours, by OpenCV": ours_by_opencv,
    "ours, by torch": ours_by_torch,
    "torchvision, Pillow": by_pillow,
    "torchvision v2, uint8": by_tensors,
}


def fidelity(photos: Photos, quick: bool) -> dict[str, Any]:
    """Differences by operation and case, then by who made the views."""
    large, larger, _, small = CASES
    some = 2 if quick else 16
    results = {}
    for operation in ("resize", "jitter", "blur", "whole view"):
        results[f"{operation}, {large.name}"] = compare(photos, large, operation, some)
    results[f"resize, {larger.name}"] = compare(photos, larger, "resize", some)
    results[f"whole view, {small.name}"] = compare(photos, small, "whole view", 8 * some)
    return {"images": some, "differences": results}


def compare(photos: Photos, case: Case, operation: str, count: int) -> dict[str, dict[str, float | str]]:
    name: PresetName = case.preset  # type: ignore[assignment]
    policy = preset(name, size=case.size)
    images = [decoded(data) for data in encoded_crops(photos, case, count, seed=1)]
    sizes = np.array([image.shape[:2] for image in images])
    pairs = draw(policy, seed=0, epoch=0, sample_ids=np.arange(count), sizes=sizes)
    draws = pairs.flatten()[:, None]  # (2 * images, 1): each view is made alone
    sources = [image for image in images for _ in range(2)]
    if operation in ("jitter", "blur"):
        # Of views that were cropped before, the same for all: the whole of an image of the view's size.
        crops = apply.crop(images, pairs, policy)
        sources = list(crops.reshape(-1, *crops.shape[2:]))
        zero, side = np.zeros_like(draws.top), np.full_like(draws.top, policy.size)
        draws = replace(draws, top=zero, left=zero, height=side, width=side)
    if operation != "whole view":
        no = np.zeros(draws.shape, np.bool_)
        draws = replace(
            draws, flip=no, grayscale=no, jitter=no | (operation == "jitter"), blur=no | (operation == "blur")
        )
    exact = [float64(image, draws[i : i + 1], policy) for i, image in enumerate(sources)]
    makers: Mapping[str, Maker] = MAKERS | ({"OpenCV, linear": linear_by_opencv} if operation == "resize" else {})
    return {name: difference(maker, sources, draws, policy, exact) for name, maker in makers.items()}


def difference(
    maker: Maker, sources: Sequence[Levels], draws: Draws, policy: Policy, exact: Sequence[Levels]
) -> dict[str, float | str]:
    """In levels of 255, over all values of all views."""
    try:
        made = [maker(image, draws[i : i + 1], policy) for i, image in enumerate(sources)]
    except NotRun as reason:
        return {"not_run": str(reason)}
    signed = np.stack([view - right for view, right in zip(made, exact, strict=True)])
    gaps = np.abs(signed)
    return {
        "mean": float(gaps.mean()),
        "p99": float(np.quantile(gaps, 0.99)),
        "worst_view": float(gaps.mean(axis=(1, 2, 3)).max()),
        "bias": float(signed.mean()),
    }


def show_fidelity(result: dict[str, Any]) -> None:
    print("\nabsolute difference from torchvision in float64, same parameters, levels of 255")
    for what, makers in result["differences"].items():
        print(f"  {what:<28}{'mean':>9}{'p99':>9}{'worst view':>12}{'bias':>9}")
        for name, entry in makers.items():
            if "not_run" in entry:
                print(f"    {name:<26}not run: {entry['not_run']}")
                continue
            cells = f"{entry['mean']:>9.2f}{entry['p99']:>9.2f}{entry['worst_view']:>12.2f}{entry['bias']:>+9.2f}"
            print(f"    {name:<26}{cells}")


def decoded(data: bytes) -> npt.NDArray[np.uint8]:
    pixels = decode(data, Limits())
    assert not isinstance(pixels, Rejected), pixels
    return pixels


def _distort(tv: Any, image: Any, draws: Draws, policy: Policy) -> Any:
    """Apply torchvision's functions, of either version and to what they take, as one draw says."""
    size = [policy.size, policy.size]
    image = tv.resized_crop(image, *_box(draws), size, antialias=True)
    if draws.flip.item():
        image = tv.hflip(image)
    if draws.jitter.item():
        for number in draws.order[0, 0].tolist():
            name, adjust = ADJUST[number]
            image = getattr(tv, adjust)(image, getattr(draws, name).item())
    if draws.grayscale.item():
        image = tv.rgb_to_grayscale(image, 3)
    if draws.blur.item():
        sigma = draws.sigma.item()
        if isinstance(image, Image.Image):  # whose own blur is what its users take
            image = image.filter(ImageFilter.GaussianBlur(radius=sigma))
        else:
            image = tv.gaussian_blur(image, [policy.blur_taps] * 2, [sigma] * 2)
    return image


def _box(draws: Draws) -> tuple[int, int, int, int]:
    return draws.top.item(), draws.left.item(), draws.height.item(), draws.width.item()
