"""The sink of gauges, and what is built on them: every panel and alert asks for something that is exported."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import promql_parser
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.observe.gauges import FADE_S, GaugeSink, instrument_name, instrument_names
from simclr_ray.observe.metrics import METRICS, Record, Recorder
from tests.unit.observe.board import ALERTS, BOARD, alerts, metrics_of, panels, queries


class Exporter:
    """Instruments that keep what they were moved to."""

    def __init__(self) -> None:
        self.gauges: dict[str, float] = {}
        self.counters: dict[str, float] = {}
        self.help: dict[str, str] = {}

    def gauge(self, name: str, text: str) -> Callable[[float], object]:
        assert name not in self.help, "made twice"
        self.help[name] = text
        return lambda value: self.gauges.__setitem__(name, value)

    def counter(self, name: str, text: str) -> Callable[[float], object]:
        assert name not in self.help, "made twice"
        self.help[name] = text

        def add(value: float) -> None:
            assert value > 0  # Ray's counters refuse anything else
            self.counters[name] = self.counters.get(name, 0) + value

        return add


def record(step: int, *, attempt: int = 1, **values: float) -> Record:
    given = {name.replace("__", "/"): value for name, value in values.items()}
    return Record(step, step * 64, attempt, 1000.0 + step, given)


def test_a_record_moves_a_gauge_for_each_of_its_metrics() -> None:
    exporter = Exporter()
    sink = GaugeSink(exporter.gauge, exporter.counter)
    sink.log(record(10, train__loss=3.5, data__wait_fraction=math.nan))
    sink.log(record(20, train__loss=3.0, attempt=2))
    assert exporter.gauges.pop("simclr_data_wait_fraction") != 0  # NaN is a value of Prometheus's too
    assert exporter.gauges == {"simclr_train_loss": 3.0, "simclr_step": 20, "simclr_attempt": 2}
    assert exporter.help["simclr_train_loss"] == METRICS["train/loss"].help


def test_what_an_exporter_forgets_is_said_again_until_it_is_old_and_where_the_run_stands_for_ever() -> None:
    exporter, now = Exporter(), [1000.0]
    sink = GaugeSink(exporter.gauge, exporter.counter, clock=lambda: now[0])
    sink.again()  # nothing is known yet
    for step in (10, 20):
        sink.log(record(step, train__loss=3.0, time__checkpoint_age_s=5.0))
    where = {"simclr_step": 20, "simclr_attempt": 1, "simclr_checkpoint_unix_s": 1015.0}
    for seconds, shown in ((FADE_S - 1, {"simclr_train_loss": 3.0} | where), (2, where), (10**6, where)):
        now[0] += seconds
        exporter.gauges.clear()
        sink.again()
        assert exporter.gauges == shown
    assert exporter.counters == {"simclr_images_total": 64 * 10}  # a counter is not counted again


@given(st.floats(0.1, 1e5))
def test_values_last_at_least_until_the_next_record_is_due(between: float) -> None:
    exporter, now = Exporter(), [0.0]
    sink = GaugeSink(exporter.gauge, exporter.counter, clock=lambda: now[0])
    for step in (1, 2):
        now[0] += between
        sink.log(record(step, train__loss=3.0))
    now[0] += between
    exporter.gauges.clear()
    sink.again()
    assert "simclr_train_loss" in exporter.gauges


def test_of_two_processes_of_a_run_one_alone_exports_its_moments() -> None:
    exporter = Exporter()
    sink = GaugeSink(exporter.gauge, exporter.counter, moments=False)
    for step in (10, 20):
        sink.log(record(step, repr__rankme=7.0))
    assert exporter.gauges == {"simclr_repr_rankme": 7.0}
    assert not exporter.counters


def test_images_are_counted_from_this_drivers_first_record_and_never_backwards() -> None:
    exporter = Exporter()
    sink = GaugeSink(exporter.gauge, exporter.counter)
    for step in (100, 110, 105, 115):  # a resumed run; then a restart that goes back to its checkpoint
        sink.log(record(step))
    assert exporter.counters == {"simclr_images_total": 64 * 20}


def test_of_a_checkpoint_the_time_is_told_so_that_its_age_grows_while_nothing_moves() -> None:
    exporter = Exporter()
    GaugeSink(exporter.gauge, exporter.counter).log(record(10, time__checkpoint_age_s=30.0))
    assert exporter.gauges["simclr_checkpoint_unix_s"] == 980.0
    assert "simclr_time_checkpoint_age_s" not in exporter.gauges


def test_every_metric_has_a_name_of_its_own() -> None:
    assert len(instrument_names()) == len(METRICS) - 1 + 4
    assert instrument_name("train/loss") == "simclr_train_loss"


def test_row_52_an_exporter_that_fails_is_dropped_with_one_warning_and_never_stops_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(name: str, text: str) -> Callable[[float], object]:
        raise RuntimeError("the metrics agent is gone")

    recorder = Recorder([GaugeSink(broken, broken)])
    for step in (1, 2, 3):
        recorder.log(record(step, train__loss=1.0))
    assert [entry.message for entry in caplog.records] == [
        "GaugeSink failed and gets no more records: RuntimeError: the metrics agent is gone"
    ]


@pytest.mark.parametrize("query", list(queries()))
def test_queries_parse_and_ask_for_metrics_that_are_exported(query: str) -> None:
    promql_parser.parse(query)
    asked = metrics_of(query)
    assert asked
    assert {name.removeprefix("ray_") for name in asked} <= instrument_names()
    assert all(name.startswith("ray_") for name in asked)


def test_the_board_has_a_panel_for_each_number_that_is_promised() -> None:
    asked = set().union(*(metrics_of(query) for of_panel in panels().values() for query in of_panel))
    promised = {
        "time_step_s", "data_images_per_s", "data_wait_fraction", "train_loss", "train_contrastive_accuracy",
        "repr_rankme", "data_rejected_total", "checkpoint_unix_s", "attempt",
    }  # fmt: skip
    assert {f"ray_simclr_{name}" for name in promised} <= asked


def test_the_board_is_laid_out_without_overlaps_and_asks_one_data_source() -> None:
    board: dict[str, Any] = json.loads(BOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "run"]


def test_alerts_say_what_and_what_to_do() -> None:
    assert {"StarvedGPUs", "StaleCheckpoint", "RisingQuarantine", "Collapsed"} <= set(alerts())
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert "{{ $labels.run }}" in rule["annotations"]["summary"]
            assert rule["annotations"]["description"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_accepts_the_alerts_and_they_fire(tmp_path: Any) -> None:
    done = subprocess.run(["promtool", "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    series = {  # one value a minute for an hour: a sick run, and a healthy one beside it
        'ray_simclr_data_wait_fraction{run="sick"}': "0.5x60",
        'ray_simclr_data_wait_fraction{run="well"}': "0.01x60",
        'ray_simclr_checkpoint_unix_s{run="sick"}': "0x60",
        'ray_simclr_checkpoint_unix_s{run="well"}': "0+60x60",
        'ray_simclr_data_rejected_total{run="sick"}': "0+60x60",
        'ray_simclr_data_rejected_total{run="well"}': "0x60",
        'ray_simclr_images_total{run="sick"}': "0+6000x60",
        'ray_simclr_images_total{run="well"}': "0+6000x60",
        'ray_simclr_train_negative_similarity{run="sick"}': "0.999x60",
        'ray_simclr_train_negative_similarity{run="well"}': "0.1x60",
        'ray_simclr_step{run="sick"}': "7x60",
        'ray_simclr_step{run="well"}': "0+10x60",
        'ray_simclr_attempt{run="sick"}': "1+1x60",
        'ray_simclr_attempt{run="well"}': "1x60",
    }
    rules = {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    spec = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertstate="firing", run="{run}"}})',
                        "eval_time": "60m",
                        "exp_samples": [{"labels": "{}", "value": len(rules)}] if run == "sick" else [],
                    }
                    for run in ("sick", "well")
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(spec))
    done = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
