"""Numbers of checkpoints while training: which is next, and how they are read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simclr_ray.data.manifest import Manifest
from simclr_ray.evaluate import online
from simclr_ray.evaluate.online import OnlineEvaluator, online_records, online_results, parse_online, read_online_set
from simclr_ray.observe.metrics import METRICS
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.derive import limits_of
from simclr_ray.train.run import RunFolder
from tests.conftest import make_data_set, real_rows, small_run
from tests.unit.publish.made import made_run

LINE = {"step": 20, "rankme": 7.5, "knn_top1": 0.5, "linear_top1": None, "wall_s": 5.0, "images": 10}


def test_results_are_records_of_known_metrics_at_the_images_seen() -> None:
    (record,) = online_records([LINE], 64)
    assert (record.step, record.samples_seen, record.wall_s) == (20, 1280, 5.0)
    assert record.values == {"repr/rankme": 7.5, "eval/knn_top1": 0.5}
    assert set(record.values) <= set(METRICS)


def test_a_torn_last_line_is_left_out() -> None:
    whole = json.dumps(LINE) + "\n"
    assert parse_online((whole + whole[:20]).encode()) == [LINE]


def test_a_run_that_measured_nothing_has_no_results(tmp_path: Path) -> None:
    assert online_results(RunFolder(str(tmp_path))) == []


def test_the_images_are_of_the_whole_set_also_where_it_is_stored_class_by_class(tmp_path: Path) -> None:
    rows = sorted(real_rows(1000), key=lambda row: int(row.label or 0))
    manifest = make_data_set(tmp_path / "data", rows)
    config = small_run(tmp_path / "run", manifest, evaluate__every=10, evaluate__online_images=400)
    data = read_online_set(manifest, config, limits_of(config.data))
    assert len(data.pool) == len(data.queries) == 200
    assert data.pool_labels is not None
    assert len(set(data.pool_labels.tolist())) > 5, "the first 400 images are of four classes"


def test_a_checkpoint_that_cannot_be_read_is_not_tried_again_and_an_older_one_is(
    data_set: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path / "run", data_set)
    config = small_run(tmp_path / "run", data_set, evaluate__every=10)
    monkeypatch.setattr(online.os, "nice", lambda _: 0)
    evaluator = OnlineEvaluator(run, config)
    monkeypatch.setattr(ckpt, "committed_steps", lambda _: [10, 20])
    assert evaluator._due() == 20

    def damaged(folder: str, step: int) -> ckpt.Checkpoint:
        raise ckpt.InvalidCheckpoint("torn")

    monkeypatch.setattr(ckpt, "load", damaged)
    evaluator._measure(20, None)  # type: ignore[arg-type]
    assert evaluator._due() == 10
    evaluator._measure(10, None)  # type: ignore[arg-type]
    assert evaluator._due() is None
