import json
import logging
import math
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.errors import DataError
from simclr_ray.observe.metrics import (
    METRICS,
    JsonlSink,
    Record,
    Recorder,
    TensorBoardSink,
    read_jsonl,
    truncate_after,
)


def record(step: int, attempt: int = 1, **values: float) -> Record:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return Record(step, samples_seen=256 * step, attempt=attempt, wall_s=1e9 + step, values=named)


class Memory:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def log(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


class FullDisk(Memory):
    def log(self, record: Record) -> None:
        raise OSError("no space left on device")


def test_every_metric_has_an_area_and_a_help_line():
    for name, metric in METRICS.items():
        assert name.count("/") == 1
        assert metric.help
        for suffix, unit in (("_s", "s"), ("_mib", "MiB"), ("_fraction", "fraction"), ("_top1", "fraction")):
            if name.endswith(suffix) and not name.endswith("_per_s"):
                assert metric.unit == unit, name


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(KeyError, match="train/loss"):
        Recorder([Memory()]).log(record(1, train__los=1.0))


def test_a_sink_that_fails_is_dropped_with_one_warning_and_the_others_go_on(caplog):
    memory = Memory()
    recorder = Recorder([FullDisk(), memory])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            recorder.log(record(step, train__loss=1.0))
    assert [r.step for r in memory.records] == [1, 2, 3]
    assert [r.message for r in caplog.records] == [
        "FullDisk failed and gets no more records: OSError: no space left on device"
    ]


def test_what_is_logged_is_read_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    written = [record(step, train__loss=1 / step, data__wait_s=0.1) for step in (1, 2, 3)]
    with Recorder([JsonlSink(path)]) as recorder:
        for one in written:
            recorder.log(one)
    assert read_jsonl(path) == written


def test_a_value_that_is_not_finite_is_valid_json_and_reads_as_nan():
    stream = StringIO()
    JsonlSink(stream).log(record(1, train__loss=math.inf, train__grad_norm=math.nan))
    line = json.loads(stream.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["train/loss"] is None
    assert line["step"] == 1


def write(path: Path, *records: Record, tail: bytes = b"") -> None:
    sink = JsonlSink(path)
    for one in records:
        sink.log(one)
    sink.close()
    with path.open("ab") as file:
        file.write(tail)


def test_a_torn_last_line_is_left_out_when_reading(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1), record(2), tail=b'{"step": 3, "samp\xc3')
    assert [r.step for r in read_jsonl(path)] == [1, 2]


def test_a_new_sink_does_not_write_onto_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1), tail=b'{"step": 2')
    write(path, record(3))
    assert [r.step for r in read_jsonl(path)] == [1, 3]


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"step": 1}\n', b"\x00\x00\n", b"\xff\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1), tail=line)
    with pytest.raises(DataError, match="line 2"):
        read_jsonl(path)


def test_resuming_keeps_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *(record(step, attempt=1) for step in range(1, 8)), tail=b'{"step": 8')
    assert truncate_after(path, 5) == 2
    write(path, *(record(step, attempt=2) for step in range(6, 11)))
    records = read_jsonl(path)
    assert [r.step for r in records] == list(range(1, 11))
    assert [r.attempt for r in records] == [1] * 5 + [2] * 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_damaged_log_does_not_stop_a_resume(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1), tail=b"\x00\x00\x00\n")
    assert truncate_after(path, 9) == 1
    assert [r.step for r in read_jsonl(path)] == [1]
    assert "line 2" in caplog.text


def test_truncating_nothing_is_nothing(tmp_path):
    assert truncate_after(tmp_path / "absent.jsonl", 3) == 0
    assert not list(tmp_path.iterdir())


@given(cut=st.integers(0, 400), step=st.integers(0, 6))
def test_whatever_byte_a_kill_stops_at_the_rest_resumes(tmp_path_factory, cut, step):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    write(path, *(record(n, train__loss=0.5) for n in range(1, 6)))
    path.write_bytes(path.read_bytes()[:cut])
    survived = [r for r in read_jsonl(path) if r.step <= step]
    truncate_after(path, step)
    assert read_jsonl(path) == survived


def test_tensorboard_gets_scalars_by_step(tmp_path):
    pytest.importorskip("tensorboard", reason="the TensorBoard sink needs the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for step in (10, 20):
        sink.log(record(step, train__loss=step / 10))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(e.step, e.value, e.wall_time) for e in events] == [(10, 1.0, 1e9 + 10), (20, 2.0, 1e9 + 20)]
