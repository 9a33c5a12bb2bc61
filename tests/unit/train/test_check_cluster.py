"""What `check` says of a cluster, from what the cluster says: resources, and disks for spilling."""

from __future__ import annotations

import pytest

from simclr_ray.config import ClusterConfig
from simclr_ray.errors import ClusterError
from simclr_ray.train.check_cluster import NodeFacts, disks, resources
from simclr_ray.train.planes import whole

GIB = 1 << 30


def test_what_is_free_now_is_told_apart_from_what_must_be_freed_or_added() -> None:
    config = ClusterConfig(workers=4, use_gpu=True, data_cpus=8)
    there = whole({"CPU": 16.0, "GPU": 4.0})
    assert list(resources(config, there, {"CPU": 16.0, "GPU": 4.0}, None)) == [
        "cluster: 16 CPUs (16 free), 4 GPUs (4 free); no autoscaler",
        "asked: 12 CPUs and 4 GPUs for 4 workers and the stream; free now",
    ]
    busy = list(resources(config, there, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 80.0, "GPU": 8.0}))
    assert busy[0].endswith("4 GPUs (1 free); the autoscaler may bring it to 80 CPUs, 8 GPUs")
    assert busy[1].endswith("GPUs must be freed or added first (cluster.start_timeout_s)")


def test_what_only_an_autoscaler_can_bring_is_no_error_and_what_nobody_can_is_one() -> None:
    config = ClusterConfig(workers=16, use_gpu=True)
    head = whole({"CPU": 4.0})
    told = list(resources(config, head, {"CPU": 4.0}, {"CPU": 64.0, "GPU": 16.0}))
    assert "CPUs and GPUs must be freed or added first" in told[-1]
    for attainable, got in ((None, "at most 4 CPUs, at most 0 GPUs"), ({"CPU": 64.0, "GPU": 8.0}, "at most 8 GPUs")):
        with pytest.raises(ClusterError, match="the cluster can never give 17 CPUs and 16 GPUs") as error:
            list(resources(config, head, {"CPU": 4.0}, attainable))
        assert error.value.got == got
        assert error.value.exit_code == 5


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
