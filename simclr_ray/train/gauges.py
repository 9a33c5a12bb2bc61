"""Gauges of a run at Ray's metrics endpoint, by `ray.util.metrics`; the driver keeps them.

The driver, and not rank 0, for it outlives the worker groups: while one restarts, the age of the checkpoint is still to
be seen. RankMe alone comes from the evaluator beside it, which measures it. Ray's agent on the process's node serves
them to Prometheus under `ray_` and the sink's names; it is part of `ray[default]`, and without it nothing is exported
and nothing fails.
"""

from __future__ import annotations

from collections.abc import Callable

import ray.util.metrics

from simclr_ray.observe.gauges import GaugeSink, Move

TAG = "run"


def ray_gauges(run: str, *, moments: bool = True) -> GaugeSink:
    """The sink of a run; its only tag is the run's name, the last part of its folder.

    `moments`: see `GaugeSink`; the driver exports them, and who measures beside it does not.
    """
    tags = {TAG: run.rstrip("/").rpartition("/")[2]}

    def gauge(name: str, description: str) -> Move:
        made = ray.util.metrics.Gauge(name, description, tag_keys=(TAG,))
        made.set_default_tags(tags)
        move: Callable[[float], object] = made.set
        return move

    def counter(name: str, description: str) -> Move:
        made = ray.util.metrics.Counter(name, description, tag_keys=(TAG,))
        made.set_default_tags(tags)
        move: Callable[[float], object] = made.inc
        return move

    return GaugeSink(gauge, counter, moments=moments)
