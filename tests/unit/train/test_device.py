"""Views whose colours the train worker does are those that the stream would have made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simclr_ray.data.decode import Limits
from simclr_ray.train.batches import StepBatch
from simclr_ray.train.device import ViewsOnDevice, finish_colours
from simclr_ray.views.policy import Policy, preset
from simclr_ray.views.stage import ViewStage, Where, draws_at
from tests.unit.views.test_stage import png, unit

POLICIES = [
    preset("imagenet-broad", size=16),
    preset("cifar", size=16),
    preset("imagenet", flavour="paper", size=16),
    # Inverted from 40 on, a level of 39.99 stays and one of 40.01 becomes 215; from 128 on, they end up side by side.
    preset("imagenet-broad", size=16).model_copy(update={"solarize_threshold": 40.0, "solarize_probability": 0.5}),
]
NAMES = ["broad", "cifar", "paper", "threshold"]
SEED = 3


def batch_of(columns: dict[str, np.ndarray]) -> StepBatch:
    return StepBatch(
        0, torch.from_numpy(columns["views"].copy()), columns["sample_id"], columns["epoch"], columns["use"],
        (len(columns["use"]),), (len(columns["use"]),), (), 0, 0.0,
    )  # fmt: skip


def made(policy: Policy, where: Where) -> dict[str, np.ndarray]:
    """A unit with a rejected image, whose place another one takes in views of its own."""
    images = [png(i) for i in range(24)]
    images[5] = images[6] = b"no image"
    return ViewStage(policy, SEED, Limits(), where)(unit(images, list(range(24)), epoch=2))


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_crops_in_the_stream_and_colours_in_the_worker_are_the_same_pictures(policy: Policy) -> None:
    finished, crops = made(policy, "cpu"), made(policy, "gpu")
    assert not np.array_equal(crops["views"], finished["views"])
    assert crops["use"].tolist().count(1) == 1
    views = ViewsOnDevice(torch.device("cpu"), policy, seed=SEED, where="gpu").bring(batch_of(crops))().numpy()
    assert_same_pictures(views, finished["views"], batch_of(crops), policy)


def assert_same_pictures(views: np.ndarray, expected: np.ndarray, batch: StepBatch, policy: Policy) -> None:
    """Equal up to rounding by one level, but where the last bits decide on which side of solarize's threshold it is.

    Those values are known: they lie at the threshold before.
    """
    difference = np.abs(views.astype(int) - expected.astype(int))
    undecided = at_threshold(batch, policy)
    assert difference[~undecided].max() <= 1
    assert (difference > 0).mean() < 1e-2
    if policy.solarize_probability:
        assert undecided.any()
        assert (difference[undecided] > 1).mean() < 0.05


def at_threshold(batch: StepBatch, policy: Policy) -> np.ndarray:
    """Which values (n, 2, S, S, 3) are solarized from a level within rounding of the threshold."""
    draws = draws_at(
        policy, seed=SEED, epoch=batch.epochs, sample_ids=batch.sample_ids,
        sizes=np.full((len(batch.uses), 2), policy.size), use=batch.uses,
    )  # fmt: skip
    unsolarized = policy.model_copy(update={"solarize_probability": 0.0})  # draws nothing else differently
    before = finish_colours(batch.views.clone(), batch, unsolarized, seed=SEED).numpy()
    return draws.solarize[:, :, None, None, None] & (np.abs(before - policy.solarize_threshold) < 1.01)


def test_finished_views_are_left_as_they_are() -> None:
    columns = made(POLICIES[1], "cpu")
    views = ViewsOnDevice(torch.device("cpu"), POLICIES[1], seed=SEED, where="cpu").bring(batch_of(columns))()
    assert np.array_equal(views.numpy(), columns["views"])


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_on_a_gpu_too(policy: Policy) -> None:
    crops = made(policy, "gpu")
    expected = finish_colours(batch_of(crops).views, batch_of(crops), policy, seed=SEED).numpy()
    views = ViewsOnDevice(torch.device("cuda"), policy, seed=SEED, where="gpu").bring(batch_of(crops))().cpu().numpy()
    assert_same_pictures(views, expected, batch_of(crops), policy)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_the_host_does_not_wait_for_a_gpu(policy: Policy, where: Where) -> None:
    batch = batch_of(made(policy, where))
    bring = ViewsOnDevice(torch.device("cuda"), policy, seed=SEED, where=where).bring
    expected = bring(batch)()  # the first call may wait, for what cuBLAS allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = bring(batch)()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(views, expected)
