"""When workers must leave the stream a CPU, as decisions about nodes that are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError
from simclr_ray.train import elastic
from simclr_ray.train.elastic import BesideTheStream, Room

CLUSTER = ClusterConfig(workers=4, min_workers=2, start_timeout_s=100)


class World:
    """Time and nodes of one CPU each, and what the desk hears."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.nodes, self.going = 1000.0, 0, frozenset[str]()
        self.said: list[str] = []
        self.failed: list[Exception] = []
        self.stop = False
        self.desk = SimpleNamespace(
            say=SimpleNamespace(remote=self.said.append), fail=SimpleNamespace(remote=self.failed.append),
            stopping=SimpleNamespace(remote=lambda: self.stop),
        )  # fmt: skip
        monkeypatch.setattr(elastic, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(elastic, "draining_nodes", lambda: self.going)
        monkeypatch.setattr(elastic.ray, "nodes", self.listed)
        monkeypatch.setattr(elastic.ray, "get", lambda value: value)

    def listed(self) -> list[dict[str, Any]]:
        return [{"NodeID": str(i), "Alive": True, "Labels": {}, "Resources": {"CPU": 1.0}} for i in range(self.nodes)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def policy(world: World, monkeypatch: pytest.MonkeyPatch) -> BesideTheStream:
    """Of Ray's own only the count is left, which is all nodes, and that it waits for the fewest workers."""
    monkeypatch.setattr(ElasticScalingPolicy, "_count_possible_workers", lambda self, _: min(4, world.nodes))

    def starting(self: BesideTheStream) -> Any:
        count = self._count_possible_workers({})
        return self._get_resize_decision(count) if count >= 2 else NoopDecision()

    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_non_running_worker_group", starting)
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: "Ray's own")
    scaling = ScalingConfig(num_workers=(2, 4), resources_per_worker={"CPU": 1})
    return BesideTheStream(scaling, CLUSTER, world.desk)


@pytest.mark.parametrize(("nodes", "going", "workers"), [(9, 0, 4), (5, 0, 4), (4, 0, 3), (4, 1, 2)])
def test_a_group_starts_with_as_many_as_leave_the_stream_a_cpu(
    world: World, policy: BesideTheStream, nodes: int, going: int, workers: int
) -> None:
    world.nodes, world.going = nodes, frozenset(map(str, range(going)))
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == workers


def test_it_waits_with_words_and_not_for_ever(world: World, policy: BesideTheStream) -> None:
    world.nodes = 2
    for _ in range(100):
        assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
        world.now += 1
    assert [text.split(":")[1][:15] for text in world.said] == [" room for 1 wor"] * 3
    world.now += 1
    with pytest.raises(ClusterError, match="no room for workers for 100 s"):
        policy.make_decision_for_non_running_worker_group()
    assert len(world.failed) == 1


def test_waiting_is_counted_anew_after_a_start(world: World, policy: BesideTheStream) -> None:
    world.nodes = 2
    policy.make_decision_for_non_running_worker_group()
    world.nodes, world.now = 5, world.now + 90
    assert isinstance(policy.make_decision_for_non_running_worker_group(), ResizeDecision)
    world.nodes, world.now = 2, world.now + 90
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)


def test_a_stop_is_heard_while_it_waits(world: World, policy: BesideTheStream) -> None:
    world.nodes, world.stop = 2, True
    with pytest.raises(ClusterError, match="stopped"):
        policy.make_decision_for_non_running_worker_group()
    assert not world.failed


@pytest.mark.parametrize(("nodes", "going", "wanted"), [(5, 0, None), (4, 0, 3), (3, 0, 2), (2, 0, None), (5, 2, None)])
def test_a_group_that_runs_shrinks_at_once_but_not_for_a_node_that_is_only_about_to_go(
    world: World, policy: BesideTheStream, nodes: int, going: int, wanted: int | None
) -> None:
    world.nodes, world.going = nodes, frozenset(map(str, range(going)))
    decision = policy.make_decision_for_running_worker_group(
        worker_group_state=SimpleNamespace(num_workers=4), worker_group_status=None
    )
    assert decision == "Ray's own" if wanted is None else decision.num_workers == wanted


def test_a_group_that_leaves_no_cpu_is_told_of_and_ends(world: World) -> None:
    said: list[str] = []
    freed: list[int] = []
    place = SimpleNamespace(free=lambda: freed.append(1))
    room = Room(CLUSTER, said.append, place)
    world.nodes = 3
    room.look(2)
    assert freed  # workers train: the stream has the CPU that was kept for it
    world.nodes = 2
    for _ in range(100):
        world.now += 1
        room.look(2)
    assert len(said) == 3
    assert all("waiting for a CPU for the stream" in text for text in said)
    world.nodes, world.now = 3, world.now + 5
    room.look(2)
    world.nodes = 2
    for _ in range(100):  # counted anew
        world.now += 1
        room.look(2)
    world.now += 5
    with pytest.raises(ClusterError, match="would leave Ray Data less than 1"):
        room.look(2)
