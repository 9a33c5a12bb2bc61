"""The pipelines that benchmarks/views.py compares: encoded bytes to two finished views an image.

Each has its policy's distributions and ends with 8-bit pixels. What favours a peer is left so: its views are dropped
at once, where ours are a new array of the whole batch. lightly's are floats, as it has them no other way; it is spared
its normalisation. A peer that is not installed says so by raising `NotRun`.

Left out, as their views are not SimCLR's: DALI and FFCV-SSL (jitter in one fixed order, hue as a linear map), and
kornia (one order of the jitter for a whole batch).
"""

from __future__ import annotations

import inspect
import io
import os
import random
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from torchvision import io as tv_io
from torchvision import transforms as v1
from torchvision.transforms import v2

import simclr_ray
from simclr_ray.data.decode import Limits
from simclr_ray.views import apply, native, opencv, stage
from simclr_ray.views.policy import Policy
from simclr_ray.views.stage import ViewStage

Encoded = Sequence[bytes]
Pass = Callable[[int], object]
"""Makes all views of the images once. Its number tells apart passes, which draw anew."""
Kind = Literal["ours", "peer", "part"]


class NotRun(Exception):
    """Why a pipeline cannot take part."""


class Pipeline(NamedTuple):
    make: Callable[[Encoded, Policy], Pass]
    kind: Kind
    """`part`: less than the whole way, for comparison."""
    packages: tuple[str, ...] = ()
    """Of a peer: the distributions that do its work, any that are installed."""


def ours(encoded: Encoded, policy: Policy) -> Pass:
    """What a program calls, with the whole set as its batch."""
    need("kernel")
    return lambda number: simclr_ray.two_views(encoded, policy=policy, epoch=number)


def ours_paper(encoded: Encoded, policy: Policy) -> Pass:
    return ours(encoded, paper(policy))


def ours_whole(encoded: Encoded, policy: Policy) -> Pass:
    """Every JPEG decoded at its full size."""
    need("kernel")
    return lambda number: simclr_ray.two_views(encoded, policy=policy, epoch=number, scaled_decode=False)


def ours_by_opencv(encoded: Encoded, policy: Policy) -> Pass:
    """As where there was no C compiler."""
    return by("OpenCV", lambda number: simclr_ray.two_views(encoded, policy=policy, epoch=number))


def ours_by_torch(encoded: Encoded, policy: Policy) -> Pass:
    """As where there is no OpenCV either."""
    return by("torch", lambda number: simclr_ray.two_views(encoded, policy=policy, epoch=number))


def ours_cropped(encoded: Encoded, policy: Policy) -> Pass:
    """What the stream does where the GPU does the colours: two crops of finished size."""
    need("kernel")
    return staged(encoded, policy, "gpu")


def staged(encoded: Encoded, policy: Policy, where: stage.Where) -> Pass:
    """What Ray Data calls, on the whole set as its unit."""
    column = np.empty(len(encoded), dtype=object)
    column[:] = list(encoded)
    ids, zeros = np.arange(len(encoded)), np.zeros(len(encoded), np.int64)
    columns = ViewStage(policy, seed=0, limits=Limits(), where=where).columns
    return lambda number: columns({"image": column, "sample_id": ids, "epoch": zeros + number, "unit": zeros})


def decode_alone(encoded: Encoded, policy: Policy) -> Pass:
    """The limit: nobody who looks at every pixel is faster."""
    needed = [3 * height * width for height, width, *_ in map(simplejpeg.decode_jpeg_header, encoded)]
    memory = np.empty(max(needed), dtype=np.uint8)

    def all_images(number: int) -> None:
        for data, size in zip(encoded, needed, strict=True):
            simplejpeg.decode_jpeg(data, buffer=memory[:size])

    return all_images


def albumentations(encoded: Encoded, policy: Policy) -> Pass:
    # It asks a server whether it is current, and tells another one what is built with it.
    for name in ("NO_ALBUMENTATIONS_UPDATE", "ALBUMENTATIONS_NO_TELEMETRY", "ALBUMENTATIONS_OFFLINE"):
        os.environ.setdefault(name, "1")
    try:
        import albumentations as A
        import cv2
    except ImportError as error:
        raise NotRun(f"not installed ({error})") from error
    cv2.setNumThreads(0)

    def given(kind: type, *names: tuple[str, str], values: Sequence[Any]) -> dict[str, Any]:
        """Arguments under this release's names: AlbumentationsX has renamed many."""
        known = inspect.signature(kind).parameters
        return {now if now in known else before: value for (now, before), value in zip(names, values, strict=True)}

    colours = ("brightness", "contrast", "saturation", "hue")
    jitter = given(A.ColorJitter, *((f"{name}_range", name) for name in colours), values=jitter_ranges(policy))
    taps = (policy.blur_taps, policy.blur_taps)
    blur_names = (("blur_range", "blur_limit"), ("sigma_range", "sigma_limit"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an argument that it does not know leaves a default in place: only a warning
        steps = [
            A.RandomResizedCrop((policy.size, policy.size), scale=policy.crop_scale, ratio=policy.crop_ratio),
            A.HorizontalFlip(p=policy.flip_probability),
            A.ColorJitter(**jitter, p=policy.jitter_probability),
            A.ToGray(p=policy.grayscale_probability),
        ]
        if policy.blur_probability:
            blur = given(A.GaussianBlur, *blur_names, values=(taps, policy.blur_sigma))
            steps.append(A.GaussianBlur(**blur, p=policy.blur_probability))
        transform = A.Compose(steps, seed=0)

    def decode(data: bytes) -> Any:
        if hasattr(cv2, "IMREAD_COLOR_RGB"):  # not in older releases, which need a pass over the pixels
            return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    return each_twice(encoded, decode, lambda image: transform(image=image)["image"])


def lightly(encoded: Encoded, policy: Policy) -> Pass:
    os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")  # older releases ask a server whether they are current
    try:
        from lightly.transforms import SimCLRTransform
    except ImportError as error:
        raise NotRun(f"not installed ({error})") from error
    transform = SimCLRTransform(
        input_size=policy.size, cj_prob=policy.jitter_probability, cj_strength=1.0, cj_bright=policy.brightness,
        cj_contrast=policy.contrast, cj_sat=policy.saturation, cj_hue=policy.hue, min_scale=policy.crop_scale[0],
        random_gray_scale=policy.grayscale_probability, gaussian_blur=policy.blur_probability,
        sigmas=policy.blur_sigma, hf_prob=policy.flip_probability, normalize=None,
    )  # fmt: skip

    def all_images(number: int) -> None:
        for data in encoded:
            transform(pillow(data))

    return all_images


def torchvision_v1(encoded: Encoded, policy: Policy) -> Pass:
    """As most SimCLR code in PyTorch has it, solo-learn's for one: all by Pillow."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*policy.blur_sigma)))

    steps = [*torchvision_steps(v1, policy), v1.RandomApply([blur], p=policy.blur_probability)]
    return each_twice(encoded, pillow, v1.Compose([*steps, v1.PILToTensor()]))


def torchvision_v1_taps(encoded: Encoded, policy: Policy) -> Pass:
    """The same with torchvision's own blur, whose kernel is as wide as the paper's."""
    if not policy.blur_probability:
        raise NotRun("no blur here: the same as with Pillow's")
    steps = [*torchvision_steps(v1, policy), torchvision_blur(v1, policy)]
    return each_twice(encoded, pillow, v1.Compose([*steps, v1.PILToTensor()]))


def torchvision_v2(encoded: Encoded, policy: Policy) -> Pass:
    """8-bit tensors from the decoder on."""

    def decode(data: bytes) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that bytes cannot be written to
            return tv_io.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), tv_io.ImageReadMode.RGB)

    blur = [torchvision_blur(v2, policy)] if policy.blur_probability else []
    return each_twice(encoded, decode, v2.Compose([*torchvision_steps(v2, policy), *blur]))


PIPELINES: dict[str, Pipeline] = {
    "ours": Pipeline(ours, "ours"),
    "ours, no scaled decode": Pipeline(ours_whole, "ours"),
    "ours, flavour paper": Pipeline(ours_paper, "ours"),
    "ours, by OpenCV": Pipeline(ours_by_opencv, "ours", ("opencv-python-headless",)),
    "ours, by torch": Pipeline(ours_by_torch, "ours"),
    "AlbumentationsX": Pipeline(
        albumentations, "peer", ("albumentationsx", "albumentations", "albucore", "opencv-python-headless")
    ),
    "torchvision v1, Pillow's blur": Pipeline(torchvision_v1, "peer", ("torchvision", "pillow")),
    "lightly": Pipeline(lightly, "peer", ("lightly",)),
    "torchvision v1": Pipeline(torchvision_v1_taps, "peer"),
    "torchvision v2": Pipeline(torchvision_v2, "peer"),
    "ours, crops alone": Pipeline(ours_cropped, "part"),
    "decode alone": Pipeline(decode_alone, "part", ("simplejpeg",)),
}
LIMIT = "decode alone"


def installed() -> dict[str, str]:
    """Versions of what the pipelines are made of."""
    found = {}
    for package in [package for pipeline in PIPELINES.values() for package in pipeline.packages]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def paper(policy: Policy) -> Policy:
    """The same distributions in Google's arithmetic."""
    return policy.model_copy(update={"flavour": "paper", "interpolation": "bicubic"})


MAKERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[], str]]] = {
    "kernel": (native.two_views, native.crop, native.why_not),
    "OpenCV": (opencv.two_views, opencv.crop, opencv.why_not),
    "torch": (apply.two_views, apply.crop, str),
}
"""Who can make our views: finished ones, crops, and what keeps it from that. In the order of `views/make.py`."""


def by(maker: str, one_pass: Pass) -> Pass:
    """The same with the views made by another maker than the machine's best, as where the better ones are missing."""
    need(maker)
    two_views, crop, _ = MAKERS[maker]

    def patched(number: int) -> object:
        with mock.patch.multiple(stage, two_views=two_views, crop=crop):
            return one_pass(number)

    return patched


def need(maker: str) -> None:
    reason = MAKERS[maker][2]()
    if reason:
        raise NotRun(reason)


def jitter_ranges(policy: Policy) -> list[tuple[float, float]]:
    strengths = (policy.brightness, policy.contrast, policy.saturation)
    return [*((max(0.0, 1 - s), 1 + s) for s in strengths), (-policy.hue, policy.hue)]


def torchvision_steps(tv: Any, policy: Policy) -> list[Any]:
    """Of either version's transforms, up to the blur. Antialiased, as Pillow does it anyway."""
    jitter = tv.ColorJitter(policy.brightness, policy.contrast, policy.saturation, policy.hue)
    return [
        tv.RandomResizedCrop(policy.size, scale=policy.crop_scale, ratio=policy.crop_ratio, antialias=True),
        tv.RandomHorizontalFlip(policy.flip_probability),
        tv.RandomApply([jitter], p=policy.jitter_probability),
        tv.RandomGrayscale(policy.grayscale_probability),
    ]


def torchvision_blur(tv: Any, policy: Policy) -> Any:
    return tv.RandomApply([tv.GaussianBlur(policy.blur_taps, policy.blur_sigma)], p=policy.blur_probability)


def pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def each_twice(encoded: Encoded, decode: Callable[[bytes], Any], transform: Callable[[Any], Any]) -> Pass:
    """Decode once, transform twice."""

    def all_images(number: int) -> None:
        for data in encoded:
            image = decode(data)
            transform(image), transform(image)

    return all_images
