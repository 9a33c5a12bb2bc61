from __future__ import annotations

import pytest
from pydantic import ValidationError

from simclr_ray.errors import ConfigError
from simclr_ray.views.policy import Policy, preset


def test_imagenet_preset_has_the_constants_of_the_paper():
    policy = preset("imagenet")
    assert policy.size == 224  # arXiv 2002.05709, section 2.2
    assert policy.crop_scale == (0.08, 1.0)  # appendix A, "Random crop and resize to 224x224"
    assert policy.crop_ratio == (3 / 4, 4 / 3)  # appendix A, same paragraph
    assert policy.flip_probability == 0.5  # appendix A, same paragraph
    assert policy.jitter_probability == 0.8  # appendix A, "Color distortion": RandomApply([color_jitter], p=0.8)
    # appendix A: transforms.ColorJitter(0.8*s, 0.8*s, 0.8*s, 0.2*s) with s = 1
    assert (policy.brightness, policy.contrast, policy.saturation, policy.hue) == (0.8, 0.8, 0.8, 0.2)
    assert policy.grayscale_probability == 0.2  # appendix A: transforms.RandomGrayscale(p=0.2)
    assert policy.blur_probability == 0.5  # appendix A, "Gaussian blur": 50% of the time
    assert policy.blur_sigma == (0.1, 2.0)  # appendix A, same paragraph
    assert policy.blur_kernel_fraction == 0.1  # appendix A: kernel size 10% of the image's side
    assert policy.interpolation == "bilinear"  # torchvision.transforms.RandomResizedCrop's default
    assert policy.central_fraction == 0.875  # google-research/simclr, data_util.CROP_PROPORTION
    assert policy.mean == (0.485, 0.456, 0.406)  # torchvision.models, weights' transforms
    assert policy.std == (0.229, 0.224, 0.225)  # torchvision.models, weights' transforms


def test_cifar_preset_has_the_constants_of_the_paper():
    policy = preset("cifar")
    assert policy.size == 32  # CIFAR-10's size
    # arXiv 2002.05709, appendix B.9: strength 0.5, no Gaussian blur, the rest as for ImageNet
    assert (policy.brightness, policy.contrast, policy.saturation, policy.hue) == (0.4, 0.4, 0.4, 0.1)
    assert policy.blur_probability == 0
    assert policy.crop_scale == (0.08, 1.0)
    assert policy.jitter_probability == 0.8
    assert policy.grayscale_probability == 0.2
    assert policy.central_fraction == 1  # google-research/simclr evaluates CIFAR-10 without a crop
    assert policy.mean is None  # google-research/simclr normalises nothing
    assert policy.std is None


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (32, 3), (96, 9), (28, 3), (8, 1), (1, 1)])
def test_blur_kernel_is_googles(size: int, taps: int):
    # google-research/simclr, data_util.py: radius = int((height // 10) / 2); 2 * radius + 1 taps
    assert Policy(size=size).blur_taps == taps == 2 * int((size // 10) / 2) + 1


def test_size_and_strength_override_the_preset():
    policy = preset("cifar", size=28, strength=1.0)
    assert (policy.size, policy.brightness, policy.hue) == (28, 0.8, 0.2)
    assert preset("imagenet", strength=0).contrast == 0


@pytest.mark.parametrize("arguments", [{"name": "mnist"}, {"strength": -1}, {"strength": float("nan")}, {"size": 0}])
def test_impossible_presets_are_errors_for_users(arguments: dict):
    with pytest.raises(ConfigError):
        preset(**{"name": "cifar", **arguments})


@pytest.mark.parametrize(
    "fields",
    [
        {"flip_probability": 1.5},
        {"brightness": -0.1},
        {"brightness": float("nan")},
        {"hue": 0.6},
        {"size": 0},
        {"crop_scale": (0.5, 0.1)},
        {"crop_scale": (0.0, 1.0)},
        {"crop_ratio": (2.0, 1.0)},
        {"blur_sigma": (0.0, 1.0)},
        {"mean": (0.5, 0.5, 0.5)},
        {"mean": (0.5, 0.5, 0.5), "std": (0.0, 1.0, 1.0)},
        {"interpolation": "nearest"},
        {"blurr_probability": 0.5},
    ],
)
def test_impossible_policies_are_refused(fields: dict):
    with pytest.raises(ValidationError):
        Policy(**fields)


def test_every_field_says_what_it_is():
    for name, field in Policy.model_fields.items():
        assert field.description, name


def test_policy_survives_json():
    policy = preset("imagenet", size=96)
    assert Policy.model_validate_json(policy.model_dump_json()) == policy
