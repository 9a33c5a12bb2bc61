"""What `check` says of a cluster, from what the cluster says: resources, and disks for spilling."""

from __future__ import annotations

import pytest

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError
from simclr_ray.train.check_cluster import NodeFacts, disks, resources
from simclr_ray.train.planes import Planes, whole

GIB = 1 << 30


def test_what_is_free_now_is_told_apart_from_what_must_be_freed() -> None:
    config = ClusterConfig(workers=4, use_gpu=True, data_cpus=8)
    there = whole({"CPU": 16.0, "GPU": 4.0})
    assert list(resources(config, there, {"CPU": 16.0, "GPU": 4.0}, None)) == [
        "cluster: 16 CPUs (16 free), 4 GPUs (4 free)",
        "asked: 12 CPUs and 4 GPUs for 4 workers and the stream; free now",
    ]
    busy = list(resources(config, there, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 80.0, "GPU": 8.0}))
    assert busy[0].endswith("4 GPUs (1 free); the autoscaler may bring it to 80 CPUs, 8 GPUs")
    assert busy[1].endswith("; GPUs must be freed first (cluster.start_timeout_s)")


def test_what_is_not_there_is_a_warning_and_what_the_autoscaler_can_never_bring_an_error() -> None:
    config = ClusterConfig(workers=16, use_gpu=True)
    head = whole({"CPU": 4.0})
    for attainable in (None, {"CPU": 64.0, "GPU": 16.0}):
        told = list(resources(config, head, {"CPU": 4.0}, attainable))
        assert told[-1].startswith("WARNING: asked: 17 CPUs and 16 GPUs for 16 workers and the stream; not there now: ")
        assert "12 CPUs for training, 16 GPUs for training, 1 CPUs for the stream." in told[-1]
    with pytest.raises(ClusterError, match="the cluster can never give 17 CPUs and 16 GPUs") as error:
        list(resources(config, head, {"CPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}))
    assert error.value.got == "at most 8 GPUs"
    assert error.value.exit_code == 5


@pytest.mark.parametrize(
    ("train", "data", "missing"),
    [
        ({"CPU": 4.0}, {"CPU": 64.0}, "4 CPUs for training"),  # as many as are wanted in all, but on the other plane
        ({"CPU": 64.0}, {}, "1 CPUs for the stream"),
        ({}, {}, "8 CPUs for training, 1 CPUs for the stream"),
        ({"CPU": 8.0}, {"CPU": 1.0}, None),
    ],
)
def test_each_plane_must_have_its_own(train: dict[str, float], data: dict[str, float], missing: str | None) -> None:
    either = {"CPU": train.get("CPU", 0.0) + data.get("CPU", 0.0)}
    told = list(resources(ClusterConfig(workers=8, use_gpu=False), Planes(train, data, either), either, None))
    assert (f"not there now: {missing}." in told[-1]) if missing else told[-1].endswith("free now")


def test_the_fullest_disk_is_named_and_one_that_ray_would_not_spill_to_is_a_warning() -> None:
    facts = {
        "10.0.0.1 (aaaaaa)": NodeFacts({}, "spill", 100 * GIB, 60 * GIB),
        "10.0.0.2 (bbbbbb)": NodeFacts({}, "spill", 100 * GIB, 4 * GIB),
    }
    said = list(disks(facts, 2 * GIB))
    assert "at least 4.0 GiB free on each node (least on 10.0.0.2 (bbbbbb))" in said[0]
    assert "up to 2.00 GiB ahead" in said[0]
    assert said[1:] == ["WARNING: the disk of 10.0.0.2 (bbbbbb) is 96.0% full, and Ray spills nothing above 95%"]
    assert list(disks({}, 0)) == []
