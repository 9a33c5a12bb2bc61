"""The folder of a search knows its own and refuses others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.search.folder import FORMAT, Identity, SearchFolder, look
from simclr_ray.search.space import load_space
from tests.conftest import make_data_set, real_rows, small_run


def identity(
    tmp_path: Path, manifest: Manifest, changes: dict[str, Any] | None = None, measured: Manifest | None = None,
    **config: Any,
) -> Identity:  # fmt: skip
    space = {"space": {"loss.temperature": {"uniform": [0.1, 1.0]}}, "trials": 4, "objective": {"every": 5}}
    run = small_run(tmp_path / "x", manifest, train__steps=10, **config)
    return Identity.of(run, manifest, load_space(space | (changes or {})), measured or manifest)


def begun(tmp_path: Path, manifest: Manifest) -> SearchFolder:
    folder = SearchFolder(str(tmp_path / "search"))
    mine = identity(tmp_path, manifest)
    look(folder, mine)
    folder.update(format=FORMAT, status="new", config=mine.config, space=mine.space)
    return folder


def test_the_same_search_is_recognised_and_what_may_change_may(data_set: Manifest, tmp_path: Path) -> None:
    folder = begun(tmp_path, data_set)
    look(folder, identity(tmp_path, data_set))
    look(folder, identity(tmp_path, data_set, {"max_concurrent": 3, "stall_s": 5.0}))
    look(folder, identity(tmp_path, data_set, {"objective": {"every": 5, "cpus": 2.0}}, cluster__workers=2))


@pytest.mark.parametrize(
    ("changes", "config", "words"),
    [
        ({"trials": 5}, {}, "space file: trials: the run has 4, now 5"),
        ({"space": {"loss.temperature": {"uniform": [0.1, 2.0]}}}, {}, "space file: space.loss.temperature"),
        ({"objective": {"every": 6}}, {}, "space file: objective.every: the run has 5, now 6"),
        ({}, {"loss__temperature": 0.3}, "loss.temperature: the run has 0.5, now 0.3"),
        ({}, {"evaluate__knn_k": 5}, "evaluate.knn_k: the run has 20, now 5"),
    ],
)
def test_another_search_is_refused_field_by_field(
    changes: dict[str, Any], config: dict[str, Any], words: str, data_set: Manifest, tmp_path: Path
) -> None:
    folder = begun(tmp_path, data_set)
    with pytest.raises(ConfigError) as caught:
        look(folder, identity(tmp_path, data_set, changes, **config))
    assert words in str(caught.value)


def test_a_search_whose_measured_images_were_packed_anew_is_refused(data_set: Manifest, tmp_path: Path) -> None:
    folder = begun(tmp_path, data_set)
    other = make_data_set(tmp_path / "other", real_rows(32))
    with pytest.raises(ConfigError, match=r"objective\.data's images: the run has"):
        look(folder, identity(tmp_path, data_set, measured=other))
