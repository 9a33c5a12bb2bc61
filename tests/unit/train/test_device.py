"""Views whose colours the train worker does are those that the stream would have made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simclr_ray.data.decode import Limits
from simclr_ray.train.batches import StepBatch
from simclr_ray.train.device import ViewsOnDevice, finish_colours
from simclr_ray.views.policy import Policy, preset
from simclr_ray.views.stage import ViewStage
from tests.unit.views.test_stage import png, unit

POLICIES = [preset("imagenet-broad", size=16), preset("cifar", size=16), preset("imagenet", flavour="paper", size=16)]


def batch_of(columns: dict[str, np.ndarray]) -> StepBatch:
    return StepBatch(
        0, torch.from_numpy(columns["views"].copy()), columns["sample_id"], columns["epoch"], columns["use"],
        (len(columns["use"]),), (len(columns["use"]),), (), 0.0,
    )  # fmt: skip


def made(policy: Policy, where: str) -> dict[str, np.ndarray]:
    """A unit with a rejected image, whose place another one takes in views of its own."""
    images = [png(i) for i in range(24)]
    images[5] = images[6] = b"no image"
    return ViewStage(policy, 3, Limits(), where)(unit(images, list(range(24)), epoch=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES, ids=["broad", "cifar", "paper"])
def test_crops_in_the_stream_and_colours_in_the_worker_are_the_same_pictures(policy: Policy) -> None:
    finished, crops = made(policy, "cpu"), made(policy, "gpu")
    assert not np.array_equal(crops["views"], finished["views"])
    assert crops["use"].tolist().count(1) == 1
    views = ViewsOnDevice(torch.device("cpu"), policy, seed=3, where="gpu")(batch_of(crops)).numpy()
    difference = np.abs(views.astype(int) - finished["views"].astype(int))
    assert difference.max() <= 1 or policy.solarize_probability  # a level at solarize's threshold is inverted, or not
    assert (difference > 1).mean() < 1e-3
    assert (difference > 0).mean() < 1e-2


def test_finished_views_are_left_as_they_are() -> None:
    columns = made(POLICIES[1], "cpu")
    views = ViewsOnDevice(torch.device("cpu"), POLICIES[1], seed=3, where="cpu")(batch_of(columns))
    assert np.array_equal(views.numpy(), columns["views"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_too() -> None:
    for policy in POLICIES:
        crops = made(policy, "gpu")
        expected = finish_colours(batch_of(crops).views, batch_of(crops), policy, seed=3)
        views = ViewsOnDevice(torch.device("cuda"), policy, seed=3, where="gpu")(batch_of(crops)).cpu()
        assert (views.int() - expected.int()).abs().float().mean() < 0.02
