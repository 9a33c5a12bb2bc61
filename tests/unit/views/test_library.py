"""View pairs from bytes in one call are what the stream makes of the same ids."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import simclr_ray
from simclr_ray.data.decode import Limits
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.views.policy import preset
from simclr_ray.views.stage import ViewStage
from tests.unit.views.test_stage import jpeg, png, unit


def test_one_call_makes_what_the_stream_makes() -> None:
    images, ids = [png(i) for i in range(5)], [7, 3, 9, 11, 2]
    expected = ViewStage(preset("cifar", size=16), 4, Limits())(unit(images, ids, epoch=6))["views"]
    views = simclr_ray.two_views(images, size=16, seed=4, epoch=6, sample_ids=ids, policy="cifar")
    assert np.array_equal(views, expected)
    again = simclr_ray.two_views(images, seed=4, epoch=6, sample_ids=ids, policy=preset("cifar", size=16))
    assert np.array_equal(again, expected)
    assert simclr_ray.two_views(images, size=8, policy=preset("cifar", size=16)).shape == (5, 2, 8, 8, 3)


def test_scaled_decode_can_be_had_and_left() -> None:
    images = [jpeg(i) for i in range(6)]
    policy = preset("imagenet", size=32)
    views = {}
    for scaled_decode in (True, False):
        whole = ViewStage(policy, 0, Limits(), scaled_decode=scaled_decode)(unit(images, list(range(6))))["views"]
        views[scaled_decode] = simclr_ray.two_views(images, policy=policy, scaled_decode=scaled_decode)
        assert np.array_equal(views[scaled_decode], whole)
    assert np.array_equal(simclr_ray.two_views(images, policy=policy), views[True])
    assert not np.array_equal(views[True], views[False])


def test_no_images_are_no_views() -> None:
    assert simclr_ray.two_views([]).shape == (0, 2, 224, 224, 3)


def test_what_does_not_decode_is_named_by_place_and_reason() -> None:
    with pytest.raises(DataError, match=r"2 of 3 images cannot be decoded \(got 0 \(empty\), 2 \(not_an_image\)\)"):
        simclr_ray.two_views([b"", png(1), b"<html>"], policy="cifar")


def test_nothing_that_decodes_is_named_likewise() -> None:
    with pytest.raises(DataError, match=r"1 of 1 images cannot be decoded \(got 0 \(not_an_image\)\)"):
        simclr_ray.two_views([b"junk"], policy="cifar")


@pytest.mark.parametrize(
    ("encoded", "options", "words"),
    [
        (png(1), {}, "list of bytes objects.*got bytes"),
        ([bytearray(png(1))], {}, "list of bytes objects.*bytearray"),
        ([np.frombuffer(png(1), np.uint8)], {}, "list of bytes objects.*ndarray"),
        ([png(1)], {"sample_ids": [1, 2]}, "each image needs one id"),
        ([png(1)], {"sample_ids": [1 << 63]}, "of 64 bits"),
        ([png(1)], {"sample_ids": [0.2]}, "whole numbers"),
        ([png(1)], {"sample_ids": ["a"]}, "whole numbers"),
        ([png(1)], {"epoch": -1}, "epoch is out of range"),
        ([], {"seed": -1}, "seed does not fit"),
        ([png(1)], {"size": 0, "policy": preset("cifar")}, "size cannot be made"),
        ([png(1)], {"policy": "imagnet"}, "unknown preset"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(encoded: object, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simclr_ray.two_views(encoded, **({"policy": "cifar"} | options))  # type: ignore[arg-type]


def test_it_needs_no_ray_and_leaves_the_threads_alone() -> None:
    code = (
        "import sys, io, torch, numpy, simclr_ray\n"
        "from PIL import Image\n"
        "stream = io.BytesIO(); Image.fromarray(numpy.zeros((9, 9, 3), 'uint8')).save(stream, 'PNG')\n"
        "torch.set_num_threads(2)\n"
        "assert simclr_ray.two_views([stream.getvalue()], policy='cifar').shape == (1, 2, 32, 32, 3)\n"
        "assert torch.get_num_threads() == 2\n"
        "assert not {'ray', 'timm', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
