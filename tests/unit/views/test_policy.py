from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from simclr_ray.errors import ConfigError
from simclr_ray.views.policy import Policy, PresetName, preset


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
    assert policy.solarize_probability == 0  # appendix A has no solarize
    assert policy.flavour == "torchvision"  # appendix A lists torchvision's transforms as the PyTorch equivalent


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


def test_broad_preset_is_imagenet_and_solarize():
    # arXiv 2002.05709, appendix B.2 names Sobel, equalize, solarize and motion blur, but no probabilities.
    # arXiv 2006.07733, appendix B, table 6: solarization probability 0.2, of values x >= 1/2; 128 / 255 is the first.
    broad = preset("imagenet-broad")
    assert (broad.solarize_probability, broad.solarize_threshold) == (0.2, 128)
    assert broad.model_copy(update={"solarize_probability": 0.0}) == preset("imagenet")
    paper = preset("imagenet-broad", flavour="paper", size=96, strength=0.5)
    assert paper.model_copy(update={"solarize_probability": 0.0}) == preset(
        "imagenet", flavour="paper", size=96, strength=0.5
    )


@pytest.mark.parametrize("name", get_args(PresetName))
def test_the_paper_flavour_has_the_constants_of_googles_code(name: PresetName):
    policy = preset(name, flavour="paper")
    assert policy.flavour == "paper"
    assert policy.interpolation == "bicubic"  # data_util.crop_and_resize: ResizeMethod.BICUBIC
    assert policy.mean is None  # data_util.preprocess_image: [0, 1], nothing subtracted
    assert policy.std is None
    assert policy.crop_scale == (0.08, 1.0)  # data_util.crop_and_resize: area_range
    assert policy.crop_ratio == (3 / 4, 4 / 3)  # data_util.crop_and_resize: aspect_ratio_range
    assert policy.flip_probability == 0.5  # tf.image.random_flip_left_right
    assert policy.jitter_probability == 0.8  # data_util.random_color_jitter: p=0.8
    assert policy.grayscale_probability == 0.2  # data_util.random_color_jitter: p=0.2
    assert policy.blur_sigma == (0.1, 2.0)  # data_util.random_blur
    assert policy.solarize_threshold == 128  # not in Google's code: as in flavour torchvision
    # data_util.color_jitter; run.py: color_jitter_strength 1.0; README for CIFAR-10: 0.5, and use_blur=False
    s = 0.5 if name == "cifar" else 1.0
    assert (policy.brightness, policy.contrast, policy.saturation) == (0.8 * s,) * 3
    assert policy.hue == 0.2 * s
    assert policy.blur_probability == (0 if name == "cifar" else 0.5)  # data_util.batch_random_blur
    assert policy.central_fraction == (1 if name == "cifar" else 0.875)  # data_util.CROP_PROPORTION


@pytest.mark.parametrize("name", get_args(PresetName))
def test_flavours_of_a_preset_differ_in_what_the_flavour_says_alone(name: PresetName):
    ours, theirs = (preset(name, flavour=flavour).model_dump() for flavour in ("torchvision", "paper"))
    differing = {field for field, value in ours.items() if theirs[field] != value}
    assert differing == {"flavour", "interpolation"} | (set() if name == "cifar" else {"mean", "std"})


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (32, 3), (96, 9), (28, 3), (8, 1), (1, 1)])
def test_blur_kernel_is_googles(size: int, taps: int):
    # google-research/simclr, data_util.py: radius = int((height // 10) / 2); 2 * radius + 1 taps
    assert Policy(size=size).blur_taps == taps == 2 * int((size // 10) / 2) + 1


def test_size_and_strength_override_the_preset():
    policy = preset("cifar", size=28, strength=1.0)
    assert (policy.size, policy.brightness, policy.hue) == (28, 0.8, 0.2)
    assert preset("imagenet", strength=0).contrast == 0


@pytest.mark.parametrize(
    "arguments",
    [{"name": "mnist"}, {"flavour": "jax"}, {"strength": -1}, {"strength": float("nan")}, {"strength": 3}, {"size": 0}],
)
def test_impossible_presets_are_errors_for_users(arguments: dict):
    with pytest.raises(ConfigError):
        preset(**{"name": "cifar", **arguments})


def test_refusals_are_sentences():
    with pytest.raises(ConfigError, match=r"unknown preset of views \(got 'mnist'\); expected imagenet, imagenet-b"):
        preset("mnist")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"unknown flavour of views \(got 'jax'\); expected torchvision, paper"):
        preset("cifar", flavour="jax")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="flavour paper resizes as Google's code does, bicubically"):
        Policy(flavour="paper")
    with pytest.raises(ValidationError, match="mean and std go together: set both, or neither"):
        Policy(std=(0.5, 0.5, 0.5))


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
        {"flavour": "jax"},
        {"flavour": "paper", "interpolation": "bilinear"},
        {"solarize_probability": -0.1},
        {"solarize_threshold": 256},
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
    for policy in (preset("imagenet", size=96), preset("imagenet-broad", flavour="paper")):
        assert Policy.model_validate_json(policy.model_dump_json()) == policy


def test_a_policy_written_before_there_were_flavours_is_torchvisions():
    fields = preset("imagenet").model_dump()
    for name in ("flavour", "solarize_probability", "solarize_threshold"):
        del fields[name]
    assert Policy.model_validate(fields) == preset("imagenet")
