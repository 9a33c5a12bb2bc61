"""What is asked of a cluster before training."""

from __future__ import annotations

from simclr_ray.train.cluster import differences, versions


def test_row_51_other_versions_are_a_line_for_each_node_and_package() -> None:
    mine = versions()
    assert differences(mine, {"10.0.0.1": mine, "10.0.0.2": dict(mine)}) == []
    other = mine | {"torch": "1.0"}
    old = {name: version for name, version in mine.items() if name != "simclr_ray"}
    assert differences(mine, {"10.0.0.1": other, "10.0.0.2": old}) == [
        f"torch: {mine['torch']} here, 1.0 on node 10.0.0.1",
        f"simclr_ray: {mine['simclr_ray']} here, None on node 10.0.0.2",
    ]
