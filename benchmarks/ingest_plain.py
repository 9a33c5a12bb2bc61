"""The plain loop of benchmarks/ingest.py: the stream's own units through the same stage, in one process and thread.

This is the floor that Ray's share is counted from: what it takes to read and make views with nobody between.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ingest_meter import between, mark

from simclr_ray.data.decode import Header, Limits, decode_reduced, read_header
from simclr_ray.data.stream import Columns, PlanAddress, load_plan, read_unit
from simclr_ray.views import stage as stage_module
from simclr_ray.views.policy import Policy
from simclr_ray.views.stage import ViewStage

STAGES = {"header": "read_header", "draw": "draws_at", "decode": "decode_reduced", "views": "two_views"}
"""Rows of the table, and the function of the stage's module that does each."""
_WARM_UP_UNITS = 3


@dataclass(frozen=True)
class PlainRun:
    """Of one process. Rates of a CPU second leave out what others took from it."""

    images: int
    wall_s: float
    cpu_s: float
    others_cores: float
    load: float
    """Load average of the machine before."""
    decode_us: float
    """CPU time of decoding alone, an image, into one reused buffer: the floor that no views can beat."""
    stages_us: dict[str, float]
    """CPU time an image; `rest` is what the loop takes beyond its named parts."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_plain(address: PlanAddress, policy: Policy, seconds: float) -> PlainRun:
    """Measure in a fresh process, which knows nothing of Ray's threads."""
    load = os.getloadavg()[0]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, address, policy, seconds, load).result()


def _measure(address: PlanAddress, policy: Policy, seconds: float, load: float) -> PlainRun:
    torch.set_num_threads(1)
    stage = ViewStage(policy, address.seed, Limits())
    manifest, plan = load_plan(address)

    def units() -> Iterator[Columns]:
        for index in itertools.count():
            table = read_unit(manifest, plan.unit(index))
            yield {name: table[name].to_numpy() for name in table.column_names}

    endless = units()
    for _ in range(_WARM_UP_UNITS):
        stage(next(endless))
    before, images = mark(os.getpid()), 0
    while time.monotonic() < before.wall_s + seconds:
        images += len(stage(next(endless))["views"])
    usage = between(before, mark(os.getpid()))
    cpu = 1e6 * usage.cpu_s / images
    stages = _stage_times(endless, stage, seconds / 2)
    stages["rest"] = cpu - sum(stages.values())
    decode = _decode_alone([next(endless) for _ in range(8)], seconds / 4)
    return PlainRun(images, usage.wall_s, usage.cpu_s, usage.others_cores, load, decode, stages)


def _stage_times(endless: Iterator[Columns], stage: ViewStage, seconds: float) -> dict[str, float]:
    """CPU microseconds an image of each part, with a clock around each call. The clocks' own time is in `rest`."""
    spent: Counter[str] = Counter()
    originals = {name: getattr(stage_module, name) for name in STAGES.values()}
    for part, name in STAGES.items():
        setattr(stage_module, name, _timed(originals[name], part, spent))
    images, stop = 0, time.monotonic() + seconds
    try:
        while time.monotonic() < stop:
            started = time.thread_time()
            unit = next(endless)
            spent["read"] += time.thread_time() - started
            images += len(stage(unit)["views"])
    finally:
        for name, original in originals.items():
            setattr(stage_module, name, original)
    return {part: 1e6 * spent[part] / images for part in ("read", *STAGES)}


def _timed(function: Callable[..., Any], part: str, spent: Counter[str]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        result = function(*args, **kwargs)
        spent[part] += time.thread_time() - started
        return result

    return timed


def _decode_alone(units: list[Columns], seconds: float) -> float:
    encoded = [data for unit in units for data in unit["image"]]
    headers = [read_header(data, Limits()) for data in encoded]
    memory = np.empty(
        3 * max(header.height * header.width for header in headers if isinstance(header, Header)), dtype=np.uint8
    )
    images, started, stop = 0, time.thread_time(), time.monotonic() + seconds
    while time.monotonic() < stop:
        for data, header in zip(encoded, headers, strict=True):
            assert isinstance(header, Header)
            decode_reduced(data, header, Limits(), buffer=memory)
        images += len(encoded)
    return 1e6 * (time.thread_time() - started) / images
