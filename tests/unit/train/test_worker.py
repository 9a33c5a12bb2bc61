"""How a step's loss follows from the config. What a worker does with it is in tests/integration/test_pretrain.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from simclr_ray.configure import load_config
from simclr_ray.train import checkpoint
from simclr_ray.train.batches import StepBatch
from simclr_ray.train.run import compare, identity
from simclr_ray.train.step_log import Position
from simclr_ray.train.worker import _loss, _position


def test_who_makes_the_views_is_no_part_of_a_run_s_identity_and_what_they_are_is() -> None:
    def kept(*changes: str) -> object:
        return identity(load_config(None, list(changes)), "m")

    same = ["views.where=gpu", "loss.exchange=ring", "loss.kernel=triton", "cluster.workers=3"]
    assert kept(*same) == kept()
    other = ["data.animated=reject", "data.max_side=500", "data.max_bytes=9000", "data.background=[0, 0, 0]"]
    other += ["views.scaled_decode=false", "views.flavour=paper", "loss.flavour=paper", "train.micro_batch=64"]
    assert all(kept(change) != kept() for change in other)


def test_a_run_from_before_scaled_decode_was_decoded_whole() -> None:
    older = identity(load_config(None, []), "m")
    del older["views.scaled_decode"]
    now, whole = (identity(load_config(None, [f"views.scaled_decode={value}"]), "m") for value in ("true", "false"))
    assert compare(older, now) == ["views.scaled_decode: the run has False, now True"]
    assert compare(older, whole) == []


def test_the_loss_is_the_config_s_and_trusts_the_plan_after_the_first_step() -> None:
    values = {"temperature": 0.3, "flavour": "paper", "exchange": "ring", "kernel": "triton"}
    config = load_config({"loss": values})
    batch = StepBatch(3, torch.zeros(8), np.zeros(8), np.zeros(8), np.zeros(8), (4, 4), (8, 16), (), 0, 0.0)
    assert _loss(config, batch, first=False).keywords == values | {"images": (8, 16)}  # type: ignore[attr-defined]
    assert _loss(config, batch, first=True).keywords == values | {"images": None}  # type: ignore[attr-defined]


def test_counts_of_a_run_are_continued_and_older_checkpoints_have_no_animated_images() -> None:
    facts = {"rejected_total": 7, "animated_total": 9}
    state = checkpoint.Checkpoint(4, {}, {}, facts)
    assert _position(state) == Position(4, 7, 9)
    assert _position(replace(state, facts={"rejected_total": 7})) == Position(4, 7, 0)
