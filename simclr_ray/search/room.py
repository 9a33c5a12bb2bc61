"""How many trials train at a time, whoever starts them.

Searchers propose no more than fit, but a continued search brings back all that were under way or failed, and Tune
starts those at once, for a trial asks for no CPU. So each takes a place here before it trains, and waits where none is
left: their workers would else hold the CPUs that all their streams wait for.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOOK_S = 1.0


class Room:
    """Places, by the names of trials; a trial whose process was lost finds its own again."""

    def __init__(self, places: int) -> None:
        self._places, self._held = places, set[str]()

    def take(self, name: str) -> bool:
        """Whether the trial has a place now."""
        if name not in self._held and len(self._held) < self._places:
            self._held.add(name)
        return name in self._held

    def give(self, name: str) -> None:
        """The trial needs none any more."""
        self._held.discard(name)


def make_room(places: int) -> Any:
    """An actor for all trials, on the driver's node, with which the search ends anyway."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Room).options(scheduling_strategy=here).remote(places)


def wait_for_a_place(room: Any, name: str) -> None:
    """Return once the trial may train; where its search is stopped meanwhile, its process is ended."""
    while room is not None and not ray.get(room.take.remote(name)):
        time.sleep(LOOK_S)


def give_back(room: Any, name: str) -> None:
    """Let another trial have the place."""
    if room is not None:
        ray.get(room.give.remote(name))
