"""How a step's loss follows from the config. What a worker does with it is in tests/integration/test_pretrain.py."""

from __future__ import annotations

import numpy as np
import torch

from simclr_ray.configure import load_config
from simclr_ray.train.batches import StepBatch
from simclr_ray.train.run import identity
from simclr_ray.train.worker import _loss


def test_who_makes_the_views_is_no_part_of_a_run_s_identity_and_what_they_are_is() -> None:
    def kept(*changes: str) -> object:
        return identity(load_config(None, list(changes)), "m")

    same = ["views.where=gpu", "loss.exchange=ring", "loss.kernel=triton", "cluster.workers=3"]
    assert kept(*same) == kept()
    other = ["views.flavour=paper", "data.animated=reject", "loss.flavour=paper", "train.micro_batch=64"]
    assert all(kept(change) != kept() for change in other)


def test_the_loss_is_the_config_s_and_trusts_the_plan_after_the_first_step() -> None:
    values = {"temperature": 0.3, "flavour": "paper", "exchange": "ring", "kernel": "triton"}
    config = load_config({"loss": values})
    batch = StepBatch(3, torch.zeros(8), np.zeros(8), np.zeros(8), np.zeros(8), (4, 4), (8, 16), (), 0.0)
    assert _loss(config, batch, first=False).keywords == values | {"images": (8, 16)}  # type: ignore[attr-defined]
    assert _loss(config, batch, first=True).keywords == values | {"images": None}  # type: ignore[attr-defined]
