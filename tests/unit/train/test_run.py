"""The run folder: what may be one, and what is removed to start afresh."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simclr_ray.configure import load_config
from simclr_ray.errors import ConfigError
from simclr_ray.train.run import RunFolder, absolute, look_at_run, note_views, start_afresh


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_row_46_a_folder_that_cannot_be_a_run_is_refused_before_any_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        look_at_run(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"holds no run.*thesis\.tex"):
        look_at_run(str(tmp_path / "other"))
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "read-only").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="cannot be written"):
            look_at_run(str(tmp_path / "read-only"))
        (tmp_path / "read-only").rmdir()
    assert contents(tmp_path) == before
    assert look_at_run(str(tmp_path / "new")).info() is None


def test_starting_afresh_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.update(identity={})
    (tmp_path / "checkpoints" / "step-000000001").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    start_afresh(run)
    assert contents(tmp_path) == ["notes.txt"]


def test_a_start_whose_views_are_made_otherwise_says_so_once_and_keeps_who_makes_them(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.update(identity={}, attempts=3)
    said: list[str] = []
    note_views(run, maker="kernel", where="cpu", say=said.append)
    note_views(run, maker="kernel", where="cpu", say=said.append)
    assert not said
    assert run.info() == {"identity": {}, "attempts": 3, "views": {"maker": "kernel", "where": "cpu"}}
    for maker, where, before in (("torch", "cpu", "kernel with views.where=cpu"), ("torch", "gpu", "torch with")):
        said.clear()
        note_views(run, maker=maker, where=where, say=said.append)
        assert len(said) == 1
        assert f"by {before}" in said[0]
        assert f"by {maker} with views.where={where} now" in said[0]
        assert "but not its bits" in said[0]
        note_views(run, maker=maker, where=where, say=said.append)
        assert len(said) == 1


def test_places_are_absolute_wherever_the_process_that_reads_them_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "run": {"folder": "r"},
        "data": {"train": "d"},
        "evaluate": {"train": "s3://b/e"},
        "distill": {"teacher": "t"},
    }
    config = absolute(load_config(given))
    places = (config.run.folder, config.data.train, config.evaluate.train, config.evaluate.test, config.distill.teacher)
    assert places == (f"{tmp_path}/r", f"{tmp_path}/d", "s3://b/e", None, f"{tmp_path}/t")
    assert absolute(config) == config
    assert absolute(load_config(None)) == load_config(None)
