"""What may happen to an image: the distributions from which a view is drawn.

A policy is plain data: `draw.py` turns it into numbers, `apply.py` into pixels. It comes in two flavours.

`torchvision`: the semantics of `RandomResizedCrop`, `ColorJitter`, ..., which the authors of SimCLR list as the
PyTorch equivalent of their TensorFlow code (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations", arXiv 2002.05709, appendix A): brightness multiplies, contrast pulls towards the mean grey,
saturation towards the pixel's grey, hue turns the HSV circle, in a random order.

`paper`: the semantics of that TensorFlow code (google-research/simclr, tf2/data_util.py): bicubic without
antialiasing, aspect ratios uniform, up to 100 attempts at a crop and then the whole image, contrast about the mean of
each channel, saturation in HSV, a blur that takes black from beyond the edge, and no normalisation. Where the paper's
text and the code differ, and where the code's way is an accident of its framework, we differ from it on purpose:

- A crop's area is uniform, as the paper says. `tf.image.sample_distorted_bounding_box` draws the height uniformly
  once it has the ratio, so that small crops are likelier; asked for `min_object_covered=0.1` of a box that is the
  whole image, it refuses those under a tenth of it; and a crop never touches the last row or column unless it spans
  them all.
- Each view has a blur of its own, as the paper says; the code draws one sigma for all first views on a replica, and
  one for all second views.
- Views are 8-bit numbers between the crop and the colours, so that the bicubic's overshoot is clipped there; the code
  keeps it until the first clip after.
- Bicubic weights are exact; TensorFlow looks them up in a table of 1024 positions.
- Brightness multiplies, as in the code's `simclrv2`; the paper's listing (`simclrv1`) adds.
- Factors below 0 are cut off where a strength exceeds 1; TensorFlow refuses contrast and saturation there.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from simclr_ray.errors import ConfigError

PresetName = Literal["imagenet", "imagenet-broad", "cifar"]
Flavour = Literal["torchvision", "paper"]
Interpolation = Literal["bilinear", "bicubic"]

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=10)]
Positive = Annotated[float, Field(gt=0, le=1000)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Channels = tuple[float, float, float]


class Policy(BaseModel):
    """Distributions of a view. Both views of a pair are drawn from the same policy, independently."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    # Defaults are the ImageNet recipe at strength 1; each constant has its source beside it.
    flavour: Flavour = "torchvision"
    """Whose arithmetic: `torchvision`'s, or that of Google's code, `paper`; the module says where they differ."""

    size: Pixels = 224
    """Side of the square view, in pixels."""

    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)  # arXiv 2002.05709, appendix A
    """Smallest and largest share of the image's area that a crop covers."""

    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # arXiv 2002.05709, appendix A
    """Smallest and largest width / height of a crop: uniform in its logarithm, or in itself (`paper`)."""

    flip_probability: Probability = 0.5  # arXiv 2002.05709, appendix A
    """Probability that a view is mirrored left to right."""

    jitter_probability: Probability = 0.8  # arXiv 2002.05709, appendix A: transforms.RandomApply([jitter], p=0.8)
    """Probability that brightness, contrast, saturation and hue are changed, all four, in a random order."""

    brightness: Strength = 0.8  # arXiv 2002.05709, appendix A: ColorJitter(0.8s, 0.8s, 0.8s, 0.2s), s = 1
    """Brightness is multiplied by a factor from [max(0, 1 - brightness), 1 + brightness]."""

    contrast: Strength = 0.8
    """Contrast is multiplied by a factor from [max(0, 1 - contrast), 1 + contrast]: about the mean grey, or about the
    mean of each channel (`paper`)."""

    saturation: Strength = 0.8
    """Saturation is multiplied by a factor from [max(0, 1 - saturation), 1 + saturation]: about the pixel's grey, or in
    HSV (`paper`)."""

    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Hue is turned by a share of the circle from [-hue, hue]."""

    grayscale_probability: Probability = 0.2  # arXiv 2002.05709, appendix A: RandomGrayscale(p=0.2)
    """Probability that a view loses its colour, after the jitter."""

    blur_probability: Probability = 0.5  # arXiv 2002.05709, appendix A: "we blur the image 50% of the time"
    """Probability that a view is blurred by a Gaussian, after its colours."""

    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)  # arXiv 2002.05709, appendix A
    """Smallest and largest standard deviation of the blur, in pixels of the view."""

    blur_kernel_fraction: Fraction = 0.1  # arXiv 2002.05709, appendix A: "10% of the image height/width"
    """Width of the blur's kernel as a share of the view's side; 0.1 gives 23 taps at 224, as in Google's code."""

    solarize_probability: Probability = 0.0  # not in SimCLR's base recipe; `imagenet-broad` has it
    """Probability that a view's bright values are inverted, last of all."""

    solarize_threshold: Annotated[float, Field(ge=0, le=255)] = 128.0  # arXiv 2006.07733, appendix B: x >= 1/2
    """Values from this level on (of 0 to 255) are inverted where a view is solarized."""

    interpolation: Interpolation = "bilinear"  # torchvision's RandomResizedCrop; Google's code says bicubic
    """How crops are resized: antialiased, but not in flavour `paper`, which knows `bicubic` alone (Keys, a = -1/2)."""

    central_fraction: Fraction = 0.875  # Google's data_util.CROP_PROPORTION; also resize 256, then crop 224
    """Share of the shorter side that the evaluation image keeps, centred; 1 keeps all of it."""

    mean: Channels | None = None
    """Mean of red, green and blue, in [0, 1], subtracted before the encoder; none leaves pixels in [0, 1]."""

    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation of red, green and blue that divides them; goes with `mean`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the first number must not exceed the second (got {low}, {high})")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: set both, or neither")
        if self.flavour == "paper" and self.interpolation != "bicubic":
            raise ValueError(
                f"flavour paper resizes as Google's code does, bicubically (got interpolation {self.interpolation}): "
                "set interpolation to bicubic, or flavour to torchvision"
            )
        return self

    @property
    def blur_taps(self) -> int:
        """Taps of the blur kernel, odd: `height // 10`, halved, doubled, plus one, as in Google's `data_util.py`."""
        return 2 * (int(self.size * self.blur_kernel_fraction) // 2) + 1


# Mean and std that torchvision's ImageNet weights expect, so that encoders can be exchanged with it. Google's
# own code normalises nothing, on either data set.
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


# SimCLR's broader policy (arXiv 2002.05709, appendix B.2) adds Sobel filtering, equalize, solarize and motion blur, but
# publishes neither probabilities nor strengths. Of the four, ours adds solarize alone, with the probability that BYOL
# publishes (arXiv 2006.07733, appendix B). BYOL solarizes one of its two views; ours are drawn alike, so both may be.
BROAD_SOLARIZE_PROBABILITY = 0.2


def preset(
    name: PresetName, *, flavour: Flavour = "torchvision", size: int | None = None, strength: float | None = None
) -> Policy:
    """Return one of the known policies.

    Args:
        name: `imagenet` (224 px, strength 1, blur), `imagenet-broad` (the same, and solarized with probability 0.2:
            not the paper's broader policy, whose probabilities are unpublished) or `cifar` (32 px, strength 0.5, no
            blur, no normalisation, so that it serves any small images).
        flavour: `torchvision`, or `paper`: bicubic without antialiasing, never normalised.
        size: Side of the view in pixels, if another than the preset's.
        strength: The paper's colour distortion strength s: brightness, contrast and saturation 0.8 s, hue 0.2 s.

    Raises:
        ConfigError: Unknown name or flavour, or a strength or size out of range.

    Source: arXiv 2002.05709, appendix A (distortions) and B.9 (CIFAR-10: s = 0.5, no blur).
    """
    _known(name, get_args(PresetName), "preset")
    _known(flavour, get_args(Flavour), "flavour")
    if size is not None and not 1 <= size <= 4096:
        raise ConfigError("views of that size cannot be made", got=size, expected="1 to 4096 pixels")
    if strength is not None and not (math.isfinite(strength) and 0 <= strength <= 2.5):
        # Hue is a share of the circle: 0.2 s reaches the whole of it, half a turn each way, at s = 2.5.
        raise ConfigError("colour distortion strength out of range", got=strength, expected="0 to 2.5")
    fields: dict[str, Any] = {"flavour": flavour}
    if flavour == "paper":
        fields["interpolation"] = "bicubic"
    if name == "cifar":
        colour = _jitter(0.5 if strength is None else strength)
        return Policy(size=size or 32, blur_probability=0.0, central_fraction=1.0, **colour, **fields)
    if flavour == "torchvision":
        fields |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if name == "imagenet-broad":
        fields["solarize_probability"] = BROAD_SOLARIZE_PROBABILITY
    return Policy(size=size or 224, **_jitter(1.0 if strength is None else strength), **fields)


def _known(value: str, expected: tuple[str, ...], what: str) -> None:
    if value not in expected:
        raise ConfigError(f"unknown {what} of views", got=repr(value), expected=", ".join(expected))


def _jitter(s: float) -> dict[str, float]:
    """Strengths of the four colour operations at distortion strength `s`."""
    return {"brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": 0.8 * s, "hue": 0.2 * s}
