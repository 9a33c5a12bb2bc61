"""What may happen to an image: the distributions from which a view is drawn.

A policy is plain data: `draw.py` turns it into numbers, `apply.py` into pixels. The semantics are those of
torchvision (`RandomResizedCrop`, `ColorJitter`, ...), which the authors of SimCLR list as the PyTorch equivalent
of their TensorFlow code (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations", arXiv 2002.05709, appendix A): brightness multiplies, contrast pulls towards the mean grey,
saturation towards the pixel's grey, hue turns the HSV circle, in a random order.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from simclr_ray.errors import ConfigError

PresetName = Literal["imagenet", "cifar"]
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
    size: Pixels = 224
    """Side of the square view, in pixels."""

    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)  # arXiv 2002.05709, appendix A
    """Smallest and largest share of the image's area that a crop covers."""

    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # arXiv 2002.05709, appendix A
    """Smallest and largest width / height of a crop."""

    flip_probability: Probability = 0.5  # arXiv 2002.05709, appendix A
    """Probability that a view is mirrored left to right."""

    jitter_probability: Probability = 0.8  # arXiv 2002.05709, appendix A: transforms.RandomApply([jitter], p=0.8)
    """Probability that brightness, contrast, saturation and hue are changed, all four, in a random order."""

    brightness: Strength = 0.8  # arXiv 2002.05709, appendix A: ColorJitter(0.8s, 0.8s, 0.8s, 0.2s), s = 1
    """Brightness is multiplied by a factor from [max(0, 1 - brightness), 1 + brightness]."""

    contrast: Strength = 0.8
    """Contrast is multiplied by a factor from [max(0, 1 - contrast), 1 + contrast]."""

    saturation: Strength = 0.8
    """Saturation is multiplied by a factor from [max(0, 1 - saturation), 1 + saturation]."""

    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Hue is turned by a share of the circle from [-hue, hue]."""

    grayscale_probability: Probability = 0.2  # arXiv 2002.05709, appendix A: RandomGrayscale(p=0.2)
    """Probability that a view loses its colour, after the jitter."""

    blur_probability: Probability = 0.5  # arXiv 2002.05709, appendix A: "we blur the image 50% of the time"
    """Probability that a view is blurred by a Gaussian, last of all."""

    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)  # arXiv 2002.05709, appendix A
    """Smallest and largest standard deviation of the blur, in pixels of the view."""

    blur_kernel_fraction: Fraction = 0.1  # arXiv 2002.05709, appendix A: "10% of the image height/width"
    """Width of the blur's kernel as a share of the view's side; 0.1 gives 23 taps at 224, as in Google's code."""

    interpolation: Interpolation = "bilinear"  # torchvision's RandomResizedCrop; Google's code says bicubic
    """How crops are resized; always antialiased."""

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
        return self

    @property
    def blur_taps(self) -> int:
        """Taps of the blur kernel, odd: `height // 10`, halved, doubled, plus one, as in Google's `data_util.py`."""
        return 2 * (int(self.size * self.blur_kernel_fraction) // 2) + 1


# Mean and std that torchvision's ImageNet weights expect, so that encoders can be exchanged with it. Google's
# own code normalises nothing, on either data set.
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


def preset(name: PresetName, *, size: int | None = None, strength: float | None = None) -> Policy:
    """Return one of the paper's two policies.

    Args:
        name: `imagenet` (224 px, strength 1, blur) or `cifar` (32 px, strength 0.5, no blur, no normalisation, so
            that it serves any small images).
        size: Side of the view in pixels, if another than the preset's.
        strength: The paper's colour distortion strength s: brightness, contrast and saturation 0.8 s, hue 0.2 s.

    Raises:
        ConfigError: Unknown name, or a strength or size out of range.

    Source: arXiv 2002.05709, appendix A (distortions) and B.9 (CIFAR-10: s = 0.5, no blur).
    """
    if name not in get_args(PresetName):
        expected = " or ".join(get_args(PresetName))
        raise ConfigError("unknown preset of views", got=repr(name), expected=expected)
    if size is not None and not 1 <= size <= 4096:
        raise ConfigError("views of that size cannot be made", got=size, expected="1 to 4096 pixels")
    if strength is not None and not (math.isfinite(strength) and 0 <= strength <= 2.5):
        # Hue is a share of the circle: 0.2 s reaches the whole of it, half a turn each way, at s = 2.5.
        raise ConfigError("colour distortion strength out of range", got=strength, expected="0 to 2.5")
    if name == "imagenet":
        colour = _jitter(1.0 if strength is None else strength)
        return Policy(size=size or 224, mean=IMAGENET_MEAN, std=IMAGENET_STD, **colour)
    colour = _jitter(0.5 if strength is None else strength)
    return Policy(size=size or 32, blur_probability=0.0, central_fraction=1.0, **colour)


def _jitter(s: float) -> dict[str, float]:
    """Strengths of the four colour operations at distortion strength `s`."""
    return {"brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": 0.8 * s, "hue": 0.2 * s}
