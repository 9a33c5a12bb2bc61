"""What is asked of a cluster before training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_ray.config import ClusterConfig
from simclr_ray.train.address import HOOK
from simclr_ray.train.cluster import CPUS_FOR_A_GPU, differences, resolve_views, versions
from simclr_ray.train.planes import Planes
from simclr_ray.views.make import Maker

MEASURED = json.loads((Path(__file__).parents[3] / "benchmarks" / "results" / "views.json").read_text())


def test_row_51_other_versions_are_a_line_for_each_node_and_package() -> None:
    mine = versions()
    assert differences(mine, {"10.0.0.1": mine, "10.0.0.2": dict(mine)}) == []
    other = mine | {"torch": "1.0"}
    old = {name: version for name, version in mine.items() if name != "simclr_ray"}
    assert differences(mine, {"10.0.0.1": other, "10.0.0.2": old}) == [
        f"torch: {mine['torch']} here, 1.0 on node 10.0.0.1",
        f"simclr_ray: {mine['simclr_ray']} here, None on node 10.0.0.2",
    ]


@pytest.mark.parametrize(("maker", "needed"), [("kernel", 3), ("opencv", 5), ("torch", 12)])
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_stream_leaves_colours_to_gpus_below_the_cpus_that_its_maker_of_views_needs(
    maker: Maker, needed: int, gpus: int
) -> None:
    config = ClusterConfig(cpus_per_worker=2)
    for for_a_gpu, expected in ((needed, "cpu"), (needed - 0.1, "gpu")):
        resources = {"CPU": gpus * (2 + for_a_gpu), "GPU": float(gpus)}
        where, why = resolve_views("auto", config, resources, workers=gpus, use_gpu=True, maker=maker)
        assert where == expected
        assert why.startswith(f"the stream has {for_a_gpu:.1f} CPUs for each GPU; ")
        assert f"by {maker} are taken to need {needed} (ResNet-50 on an H100, images of 500 x 375)" in why


def test_on_a_cluster_without_nodes_for_the_stream_they_will_do_the_colours() -> None:
    """An autoscaler adds as many as are asked for; a choice for the GPUs would stay for the whole run."""
    empty = Planes({}, {}, {})
    config = ClusterConfig(workers=32, data_labels={"simclr-role": "data"})
    assert resolve_views("auto", config, empty, workers=32, use_gpu=True, maker="kernel")[0] == "cpu"


@pytest.mark.parametrize(
    ("maker", "name"), [("kernel", "ours"), ("opencv", "ours, by OpenCV"), ("torch", "ours, by torch")]
)
def test_the_cpus_for_a_gpu_are_twice_those_that_the_benchmark_asks_for(maker: Maker, name: str) -> None:
    rate = MEASURED["speed"]["cases"]["500 x 375"]["pipelines"][name]["images_a_second"]
    assert CPUS_FOR_A_GPU[maker] == pytest.approx(2 * 1250 / rate, rel=0.2)


def test_what_every_worker_process_of_a_search_runs_first_is_light() -> None:
    """Torch in each of a trial's ten small processes took most of a short trial's time."""
    program = f"import sys, {HOOK.rpartition('.')[0]}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
