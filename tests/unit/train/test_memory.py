"""What is said when a batch does not fit into a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.data.plan import units_per_micro_batch
from simclr_ray.train.derive import Derived
from simclr_ray.train.memory import out_of_memory, smaller_micro_batch

RUN = Derived(
    samples=10_000, unit_rows=64, units_per_epoch=156, rows_left_out=16, units_per_step=64, units_per_micro_batch=64,
    steps_per_epoch=2.44, total_steps=100, warmup_steps=10, peak_learning_rate=1.0, negatives_per_anchor=8190,
)  # fmt: skip
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


@given(st.integers(1, 200), st.data())
def test_a_smaller_micro_batch_is_valid_and_the_next_one(per_step: int, data: st.DataObject) -> None:
    now = data.draw(st.sampled_from([units for units in range(1, per_step + 1) if per_step % units == 0]))
    smaller = smaller_micro_batch(replace(RUN, units_per_step=per_step, units_per_micro_batch=now))
    if now == 1:
        assert smaller is None
        return
    assert smaller is not None
    units = units_per_micro_batch(smaller, per_step, RUN.unit_rows)
    assert units < now
    assert not any(per_step % between == 0 for between in range(units + 1, now))


def test_row_39_the_ways_out_are_named_with_what_they_cost() -> None:
    said = str(out_of_memory(ERROR, RUN, at="rank 3 at step 7 in compute for 2 s", workers=8))
    assert "out of memory on rank 3 at step 7" in said
    assert "Tried to allocate 2.00 GiB" in said
    assert "more lines" not in said
    assert "two views of 512 images at a time" in said
    assert "cluster.workers=16 (the run goes on" in said
    assert "train.micro_batch=2048 (" in said


def test_what_cannot_be_smaller_is_not_proposed() -> None:
    said = str(out_of_memory(ERROR, replace(RUN, units_per_step=1, units_per_micro_batch=1), at="rank 0", workers=1))
    assert "micro_batch" not in said
    assert "cluster.workers" not in said
    assert "model.encoder" in said
