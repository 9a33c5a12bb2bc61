"""When all ranks save or stop: rank 0 decides, and tells the others after every step.

One broadcast of one number a step. It costs tens of microseconds, and without it a save that the clock or a node's
notice asks for could not be a moment that all ranks share: each then writes its part of the record, so that a resumed
run counts on from exactly there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist

from simclr_ray.config import TrainConfig
from simclr_ray.train.checkpoint import Checkpoint
from simclr_ray.train.saver import Intervals, Saver, Verdict


class Saves:
    """On every rank; only rank 0's has a `Saver`."""

    def __init__(
        self, folder: str, config: TrainConfig, last_step: int, desk: Any, *, rank: int, device: torch.device
    ) -> None:
        self._verdict = torch.zeros(1, dtype=torch.int32, device=device)
        self._heard: int | None = None
        self._saver = None
        if rank == 0:
            self._saver = Saver(
                folder,
                Intervals(config.checkpoint_every, config.checkpoint_every_s, last_step),
                keep=config.keep_checkpoints,
                max_failures=config.max_failed_saves,
                say=lambda text: ray.get(desk.say.remote(text)),
            )

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, *_: object) -> None:
        if self._saver:
            self._saver.wait()  # a save under way is worth its time, however the steps ended

    def listen(self, answer: tuple[int, bool]) -> None:
        """Take the driver's wishes, as `Desk.pulse` returns them."""
        asked, stopping = answer
        if self._saver is None:
            return
        if self._heard is not None and asked > self._heard:  # what was asked for before this attempt is over
            self._saver.ask()
        self._heard = asked
        if stopping:
            self._saver.stop()

    def agree(self, step: int) -> Verdict:
        """What to do after `step` steps, the same on all ranks, which call this together."""
        if self._saver:
            self._verdict.fill_(int(self._saver.verdict(step)))
        dist.broadcast(self._verdict, src=0)
        return Verdict(int(self._verdict.item()))

    def age_s(self) -> float | None:
        """Rank 0: see `Saver.age_s`; None on the others."""
        return self._saver.age_s() if self._saver else None

    def rescue(self, checkpoint: Checkpoint, *, first: Callable[[], None]) -> None:
        """Rank 0: try to keep a state that training cannot go on from; nothing happens on the others."""
        if self._saver is not None:
            self._saver.save_what_there_is(checkpoint, first=first)

    def save(self, checkpoint: Checkpoint, *, first: Callable[[], None]) -> tuple[float, float | None]:
        """Rank 0: begin to save, see `Saver.save`.

        Returns:
            Seconds the steps were held up, and how long the save before took in its thread.
        """
        assert self._saver is not None
        return self._saver.save(checkpoint, first=first), self._saver.take_seconds()
