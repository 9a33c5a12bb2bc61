"""What a run folder says is read as far as it is there, and an unfinished or damaged one is told, not refused."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
import yaml

from simclr_ray import storage
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.observe.metrics import Record
from simclr_ray.publish.describe import comparable_losses, facts_of, settings_table
from simclr_ray.publish.record import RunRecord, attempts_of, labels_of, read_record
from simclr_ray.publish.report_charts import health, learning
from simclr_ray.publish.report_tables import results_sections
from simclr_ray.train.lock import Holder, hold
from simclr_ray.train.run import compare, open_existing
from tests.unit.publish.made import NOON, made_run, record_of, results, supervised


def test_a_finished_run_is_read_whole(tmp_path: Path, data_set: Manifest) -> None:
    made_run(tmp_path / "run", data_set, evaluation=results(0.8, knn=0.7))
    record = read_record(str(tmp_path / "run"))
    assert (record.status, record.step, record.total_steps, record.images_seen) == ("finished", 6, 6, 384)
    assert (record.result("linear_top1"), record.result("knn_top1"), record.result("rankme")) == (0.8, 0.7, 9.5)
    assert record.last("train/loss") == pytest.approx(4.4)
    assert record.cost.seconds == pytest.approx(6)  # six steps of a second, the first before its record
    assert record.cost.worker_hours == pytest.approx(12 / 3600)
    assert record.notes == ()
    facts = dict(facts_of(record))
    assert facts["steps"] == "6 of 6 (100%)"
    assert facts["waited for data"] == "25.0% of the step time"


def test_what_was_measured_while_training_is_read_and_drawn(tmp_path: Path, data_set: Manifest) -> None:
    run = made_run(tmp_path / "run", data_set)
    lines = [{"step": step, "rankme": 5.0 + step, "knn_top1": 0.5, "linear_top1": 0.6} for step in (2, 4)]
    (tmp_path / "run" / "eval").mkdir(exist_ok=True)
    (tmp_path / "run" / "eval" / "online.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    record = read_record(run.uri)
    assert [one.samples_seen for one in record.measured] == [128, 256]
    assert "kNN, held out" in "".join(learning([record], ["run"]))
    assert "RankMe while training" in "".join(health([record], ["run"]))
    (tmp_path / "run" / "eval" / "online.jsonl").write_text('{"rankme": 1}\n')
    assert read_record(run.uri).notes[0].startswith("eval/online.jsonl cannot be read")


def test_trained_classifiers_and_other_test_sets_have_their_tables(tmp_path: Path, data_set: Manifest) -> None:
    run = made_run(tmp_path / "run", data_set, evaluation=results(0.8))
    storage.write_bytes(run.path("eval/protocols.json"), json.dumps(supervised([0.79, 0.80, 0.81])).encode())
    storage.write_bytes(run.path("eval/birds/results.json"), json.dumps(results(0.4, test="/data/birds")).encode())
    storage.write_bytes(run.path("eval/cats/protocols.json"), json.dumps(supervised([0.6], test="/data/cats")).encode())
    storage.write_bytes(run.path("eval/old/results.json"), b'{"rows": 3}')
    storage.write_bytes(run.path("eval/torn/results.json"), b"{")
    record = read_record(run.uri)
    tables = results_sections(record)
    assert [table["title"] for table in tables] == ["", "", "Transfer: birds", "Transfer: cats"]
    assert tables[1]["rows"] == [["finetune, 10%", "1,200", "80.0 [77.5, 82.5]", "3", "12"]]
    assert "test set /data/birds" in tables[2]["about"]
    assert record.result("linear_top1") == 0.8, "of the run's own test set"
    assert [note.split(":")[0] for note in record.notes] == ["eval/torn/results.json cannot be read"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run here"):
        read_record(str(tmp_path))


def test_what_is_missing_or_damaged_is_a_note(tmp_path: Path, data_set: Manifest) -> None:
    run = made_run(tmp_path / "run", data_set, evaluation=results(0.8))
    (tmp_path / "run" / "eval" / "results.json").write_text("{")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "samp')  # torn by a kill
    record = read_record(run.uri)
    assert record.step == 6
    assert record.evaluation == {}
    assert [note.split(":")[0] for note in record.notes] == ["eval/results.json cannot be read"]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    resolved = tmp_path / "run" / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("temperature:", "warmth:", 1))
    record = read_record(run.uri)
    assert record.config is None
    assert record.records == ()
    assert any("no metrics.jsonl yet" in note for note in record.notes)
    assert any("another version" in note for note in record.notes)
    assert facts_of(record)


def test_a_run_with_a_setting_that_is_gone_is_read_and_goes_on_where_it_did_nothing(
    tmp_path: Path, data_set: Manifest
) -> None:
    run = made_run(tmp_path / "run", data_set)
    resolved = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    for value, readable in ((0.0, True), (0.1, False)):
        resolved["distill"]["label_fraction"] = value
        (tmp_path / "run" / "resolved.yaml").write_text(yaml.safe_dump(resolved))
        record = read_record(run.uri)
        assert (record.config is not None) == readable
        existing = (run.info() or {})["identity"] | {"distill.label_fraction": value}
        assert (compare(existing, (run.info() or {})["identity"]) == []) == readable
        if readable:
            assert open_existing(run.uri)[1] == record.config
        else:
            assert "label_fraction" in record.notes[0]


def test_a_list_reads_the_probes_alone(tmp_path: Path, data_set: Manifest) -> None:
    run = made_run(tmp_path / "run", data_set, evaluation=results(0.8))
    storage.write_bytes(run.path("eval/birds/results.json"), json.dumps(results(0.4)).encode())
    assert len(read_record(run.uri).evaluated) == 2
    lean = read_record(run.uri, whole=False)
    assert [one.name for one in lean.evaluated] == [""]
    assert lean.result("linear_top1") == 0.8


def test_numbers_that_are_none_are_dashes(tmp_path: Path, data_set: Manifest) -> None:
    strange = results(0.8)
    strange["rows"][0] |= {"knn_top1": 10**400, "rankme": "many", "linear": {"10 labels": {"values": [None, 0.5]}}}
    record = read_record(made_run(tmp_path / "run", data_set, evaluation=strange).uri)
    assert results_sections(record)[0]["rows"][0][:4] == ["raw pixels", "-", "50.0", "-"]


def test_a_run_that_says_it_is_running_is_believed_while_its_driver_beats(tmp_path: Path, data_set: Manifest) -> None:
    run = made_run(tmp_path / "run", data_set, status="running")
    assert read_record(run.uri).status == "stopped without a word"
    with hold(run.uri, lambda line: None):
        assert read_record(run.uri).status == "running"
    silent = Holder("token", "elsewhere", "boot", os.getpid(), 1, time.time() - 7200)
    (tmp_path / "run" / "lock.json").write_bytes(silent.encode())
    assert read_record(run.uri).status == "stopped, no heartbeat for 2 h 00 min"


def test_attempts_are_told_apart_with_the_waits_between() -> None:
    first = [record_of(step) for step in (1, 2, 3)]
    second = [record_of(step, attempt=2, wall_s=NOON + 100 + step) for step in (4, 5)]
    a, b = attempts_of([*first, *second])
    assert (a.number, a.first_step, a.last_step, a.seconds) == (1, 0, 3, 3)
    assert (b.number, b.first_step, b.last_step, b.seconds) == (2, 3, 5, 2)
    assert b.began - a.ended == 100
    assert attempts_of([]) == []


def test_an_attempt_never_begins_before_the_end_of_the_one_before() -> None:
    slow = Record(2, 128, 2, NOON + 5, {"time/step_s": 60.0})
    a, b = attempts_of([record_of(1), slow])
    assert b.began == a.ended
    (c,) = attempts_of([Record(1, 64, 1, NOON, {"time/step_s": math.nan})])
    assert c.seconds == 0


def test_a_mean_weighs_records_by_their_steps() -> None:
    def record(step: int, wait: float) -> Record:
        return Record(step, step, 1, NOON, {"data/wait_fraction": wait})

    run = RunRecord("r", {}, records=(record(10, 0.5), record(11, math.nan), record(31, 0.2)))
    assert run.mean("data/wait_fraction") == pytest.approx((10 * 0.5 + 20 * 0.2) / 30)
    assert run.mean("train/loss") is None
    assert run.last("data/wait_fraction") == 0.2


def test_labels_are_as_short_as_tells_runs_apart() -> None:
    def labels(*uris: str) -> list[str]:
        return labels_of([RunRecord(uri, {}) for uri in uris])

    assert labels("/a/x", "/a/y/") == ["x", "y"]
    assert labels("s3://b/one/run", "s3://b/two/run") == ["one/run", "two/run"]
    assert len(set(labels("/a/x", "/a/x"))) == 2


def test_settings_that_differ_are_marked(tmp_path: Path, data_set: Manifest) -> None:
    warm = made_run(tmp_path / "warm", data_set, loss__temperature=0.5)
    cold = made_run(tmp_path / "cold", data_set, loss__temperature=0.1)
    records = [read_record(warm.uri), read_record(cold.uri)]
    table = settings_table(records, ["warm", "cold"], None)
    rows = {row["key"]: row for row in table["rows"]}
    assert rows["loss.temperature"]["values"] == ["0.1", "0.5", "0.1"]
    assert rows["loss.temperature"]["differs"]
    assert not rows["views.size"]["differs"]
    assert "train.precision" not in rows  # the default in both
    assert not comparable_losses(records)
    assert comparable_losses(records[:1])
    recipe = records[0].config
    against = settings_table(records[:1], ["warm"], recipe)
    assert not any(row["differs"] for row in against["rows"])


def test_results_of_another_shape_do_no_harm(tmp_path: Path, data_set: Manifest) -> None:
    odd = {"rows": [None, 3, {"name": "trained encoder", "linear": [1], "knn_top1": "high"}], "step": "?"}
    run = made_run(tmp_path / "run", data_set, evaluation=json.loads(json.dumps(odd)))
    record = read_record(run.uri)
    assert record.result("linear_top1") is None
    assert record.result("knn_top1") is None
