"""`runs` finds run folders where they lie, and ranks only what compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simclr_ray import storage
from simclr_ray.cli import main
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.publish.runs import HEADER, differences, find_runs, ranked, read_runs, summary, table_of
from tests.unit.publish.made import made_run, results, supervised


@pytest.fixture
def folder(tmp_path: Path, data_set: Manifest) -> Path:
    """Three runs in two levels, beside things that are none."""
    run = made_run(tmp_path / "runs" / "a", data_set, evaluation=results(0.7))
    storage.write_bytes(run.path("eval/protocols.json"), json.dumps(supervised([0.79, 0.80, 0.81])).encode())
    storage.write_bytes(run.path("eval/birds/results.json"), json.dumps(results(0.4, test="/data/birds")).encode())
    made_run(tmp_path / "runs" / "search" / "b", data_set, evaluation=results(0.9), loss__temperature=0.1)
    made_run(tmp_path / "runs" / "search" / "c", data_set, status="interrupted", steps=2)
    (tmp_path / "runs" / "search" / "b" / "checkpoints").mkdir()
    (tmp_path / "runs" / "search" / "b" / "checkpoints" / "run.json").write_text("{}")  # inside a run: not looked at
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    return tmp_path / "runs"


def test_runs_are_found_below_a_folder_each_once(folder: Path) -> None:
    found = find_runs([str(folder), str(folder / "a")])
    assert [Path(uri).relative_to(folder).as_posix() for uri in found] == ["a", "search/b", "search/c"]
    with pytest.raises(ConfigError, match="no run here"):
        find_runs([str(folder / "search" / "b" / "checkpoints" / "none")])


def test_a_list_has_a_line_a_run(folder: Path) -> None:
    summaries = [summary(record) for record in read_runs([str(folder)])]
    rows = table_of(summaries, ["a", "b", "c"])
    assert all(len(row) == len(HEADER) for row in rows)
    assert [row[1] for row in rows] == ["finished", "finished", "interrupted"]
    assert [row[5] for row in rows] == ["70.0", "90.0", "-"]
    assert rows[2][2] == "2/2"


def test_the_best_is_first_and_what_does_not_compare_is_refused(folder: Path, data_set: Manifest) -> None:
    records = read_runs([str(folder)])
    assert [one.linear_top1 for one in ranked(records, "linear_top1")] == [0.9, 0.7]
    with pytest.raises(ConfigError, match="losses of these runs do not compare"):
        ranked(records, "loss")
    alike = [record for record in records if record.name != "b"]
    assert [one.loss for one in ranked(alike, "loss")] == pytest.approx([4.4, 4.8])
    made_run(folder / "d", data_set, evaluation=results(0.95, test="/another/test"))
    with pytest.raises(ConfigError, match="different test sets"):
        ranked(read_runs([str(folder)]), "linear_top1")
    with pytest.raises(ConfigError, match="none of the runs has linear_top1"):
        ranked(read_runs([str(folder / "search" / "c")]), "linear_top1")


def test_differences_are_those_and_no_more(folder: Path) -> None:
    rows = {row[0]: row[1:] for row in differences(read_runs([str(folder / "a"), str(folder / "search" / "b")]))}
    assert rows == {"loss.temperature": ["0.5", "0.1"]}


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["runs", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    assert len(run("ls", folder).splitlines()) == 5
    lines = [json.loads(line) for line in run("ls", folder, "--json").splitlines()]
    assert [line["status"] for line in lines] == ["finished", "finished", "interrupted"]
    best = run("best", folder)
    assert best.index("search/b") < best.index("best first by linear_top1; 1 without it are not listed")
    assert "no longer an honest estimate" in best
    shown = run("show", folder / "a")
    assert "attempt 1: steps 1 to 6" in shown
    assert "trained encoder" in shown
    assert "80.0 [77.5, 82.5]" in shown
    assert shown.index("Transfer: birds") < shown.index("test set /data/birds")
    (line,) = (json.loads(line) for line in run("show", folder / "a", "--json").splitlines())
    assert [table["title"] for table in line["results"]] == ["", "", "Transfer: birds"]
    compared = run("compare", folder / "a", folder / "search" / "b")
    assert "loss.temperature" in compared
    assert "do not compare" in compared
    assert main(["runs", "compare", str(folder / "a")]) == 2
    assert "nothing to compare" in capsys.readouterr().err
