"""Planes as arithmetic: which nodes count, and what is left for the stream."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError
from simclr_ray.train.cluster import resolve_views, resolve_workers
from simclr_ray.train.planes import Planes, matches, planes_of, refuse_too_few_cpus, workers_that_fit


def node(role: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Labels": {"simclr-role": role}, "Resources": resources}


NODES = [
    node("head", CPU=4.0), node("train", CPU=8.0, GPU=8.0), node("train", CPU=8.0, GPU=8.0), node("data", CPU=32.0),
    node("data", alive=False, CPU=32.0),
]  # fmt: skip
TWO_PLANES = {"train_labels": {"simclr-role": "train"}, "data_labels": {"simclr-role": "data"}}


@pytest.mark.parametrize(
    ("selector", "labels", "found"),
    [
        ({}, {}, True),
        ({"a": "x"}, {"a": "x", "b": "y"}, True),
        ({"a": "x"}, {"a": "y"}, False),
        ({"a": "x"}, {}, False),
        ({"a": "!x"}, {}, True),
        ({"a": "!x"}, {"a": "x"}, False),
        ({"a": "in(x, y)"}, {"a": "y"}, True),
        ({"a": "in(x,y)"}, {"a": "z"}, False),
        ({"a": "!in(x, y)"}, {"a": "z"}, True),
        ({"a": "!in(x, y)"}, {"a": "x"}, False),
        ({"a": "x", "b": "y"}, {"a": "x"}, False),
    ],
)
def test_a_selector_means_what_rays_own_means(selector: dict[str, str], labels: dict[str, str], found: bool) -> None:
    assert matches(selector, labels) is found


def test_without_labels_both_planes_are_all_living_nodes() -> None:
    planes = planes_of(ClusterConfig(), NODES)
    assert planes == Planes({"CPU": 52.0, "GPU": 16.0}, {"CPU": 52.0, "GPU": 16.0}, {"CPU": 52.0, "GPU": 16.0})
    assert planes.cpus_left(20) == 32


def test_workers_and_their_gpus_are_counted_on_train_nodes_and_the_streams_cpus_on_data_nodes() -> None:
    config = ClusterConfig(**TWO_PLANES)
    planes = planes_of(config, NODES)
    assert planes.train == {"CPU": 16.0, "GPU": 16.0}
    assert planes.data == {"CPU": 32.0}
    assert planes.cpus_left(16) == 32  # workers take nothing from the data plane
    assert resolve_workers(config, planes) == (16, True)
    where, why = resolve_views("auto", config, planes, workers=16, use_gpu=True, maker="kernel")
    assert (where, why.split(" CPUs")[0]) == ("gpu", "the stream has 2.0")


def test_cpus_that_both_planes_may_use_are_left_to_the_stream_as_long_as_workers_have_others() -> None:
    config = ClusterConfig(data_labels={"simclr-role": "data"})  # train workers anywhere
    planes = planes_of(config, NODES)
    assert planes.cpus_left(20) == 32
    assert planes.cpus_left(30) == 22


def test_more_workers_than_the_train_nodes_have_cpus_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = ClusterConfig(workers=17, use_gpu=False, **TWO_PLANES)
    with pytest.raises(ClusterError, match="17 workers of 1 CPUs do not fit on the nodes") as told:
        resolve_workers(config, planes_of(config, NODES))
    assert "cluster.workers=16" in str(told.value)


def test_labels_that_no_node_has_are_refused_by_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = ClusterConfig(workers=1, data_labels={"simclr-role": "dta"})
    with pytest.raises(ClusterError, match=r"cluster.data_labels: no node of the cluster has these labels"):
        resolve_workers(config, planes_of(config, NODES))


@given(
    only_train=st.integers(0, 9), shared=st.integers(0, 9), only_data=st.integers(0, 9),
    data_cpus=st.integers(1, 4), per_worker=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
)  # fmt: skip
def test_just_the_workers_that_fit_are_not_refused(
    only_train: int, shared: int, only_data: int, data_cpus: int, per_worker: float
) -> None:
    config = ClusterConfig(data_cpus=data_cpus, cpus_per_worker=per_worker)
    planes = Planes(
        {"CPU": only_train + shared}, {"CPU": shared + only_data}, {"CPU": only_train + shared + only_data}
    )  # fmt: skip
    fitting = workers_that_fit(config, planes)
    if fitting:
        refuse_too_few_cpus(config, planes, fitting)
    with pytest.raises(ClusterError):
        refuse_too_few_cpus(config, planes, fitting + 1)
