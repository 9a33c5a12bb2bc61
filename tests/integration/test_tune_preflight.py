"""What a search refuses before its first trial."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ClusterError, ConfigError
from simclr_ray.search.tune import tune
from tests.conftest import small_run

pytestmark = pytest.mark.integration

SPACE: dict[str, Any] = {
    "space": {"loss.temperature": {"uniform": [0.1, 1.0]}}, "trials": 2, "objective": {"every": 2},
}  # fmt: skip


def test_a_ray_whose_state_api_does_not_answer_is_refused_with_the_fix(
    local_ray: None, data_set: Manifest, tmp_path: Path
) -> None:
    """The Ray of these tests has no dashboard. A killed trial would leave its placement group for ever."""
    with pytest.raises(ClusterError, match=r"(?s)State API does not answer.*include-dashboard=true"):
        tune(small_run(tmp_path / "run", data_set, train__steps=4), SPACE, str(tmp_path / "search"))
    assert not (tmp_path / "search" / "trials").exists()
    assert not (tmp_path / "search" / "lock.json").exists()


def test_a_dashboard_that_is_not_installed_is_asked_for(
    data_set: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setitem(sys.modules, "ray.dashboard.optional_deps", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"simclr-ray\[dashboard\]"):
        tune(small_run(tmp_path / "run", data_set, train__steps=4), SPACE, str(tmp_path / "search"))
    assert not (tmp_path / "search").exists()


def test_a_folder_of_something_else_is_refused(data_set: Manifest, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match="holds no search"):
        tune(small_run(tmp_path / "run", data_set, train__steps=4), SPACE, str(tmp_path))
