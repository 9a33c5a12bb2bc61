"""Run many Ray tasks whose results lie on storage, some at a time, and stop all at the first error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import ray

from simclr_ray.errors import root_cause

T = TypeVar("T")
WAITING_FOR_EACH_CPU = 2
"""Tasks handed to Ray for each CPU of the cluster: enough that none is idle, few enough that Ray holds 10^5 of them."""


def run(function: Callable[..., T], calls: Iterable[tuple[Any, ...]], *, common: tuple[Any, ...] = ()) -> Iterator[T]:
    """Results of `function(*call, *common)` for each call, as they are ready, in no order.

    Args:
        function: A function of a module; it runs on any machine of the cluster.
        calls: Arguments of each task.
        common: Further arguments, the same for all, which are stored once.

    Raises:
        SimclrError: what a task raised; those that run are left to end, no more are started.
    """
    remote = ray.remote(num_cpus=1)(function)
    shared = [ray.put(one) for one in common]
    window = max(8, int(WAITING_FOR_EACH_CPU * ray.cluster_resources().get("CPU", 1)))
    waiting = iter(calls)
    running: list[Any] = []
    try:
        while True:
            running += [remote.remote(*call, *shared) for call in islice(waiting, window - len(running))]
            if not running:
                return
            ready, running = ray.wait(running, num_returns=1)
            yield ray.get(ready[0])
    except Exception as error:
        for one in running:
            ray.cancel(one)
        cause = root_cause(error)
        if cause is None or cause is error:
            raise
        raise cause from error
