"""Records, ranking, finalists, and what is written of them."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest
from simclr_ray.search import results
from simclr_ray.search.charts import Axis, Line, Scale, parallel, plot
from simclr_ray.search.finalists import GIVEN, Finalist, cases, choose, summarise, verdict
from simclr_ray.search.objective import WORST
from simclr_ray.search.page import Page, _is_log, render
from simclr_ray.search.record import Generation, Place, Score, TrialRecord, read_record, read_records
from simclr_ray.search.space import SearchSpec, load_space
from tests.conftest import small_run

KEY = "loss.temperature"


def trial(
    name: str, value: float, *, steps: tuple[int, ...] = (5, 10), status: Any = "finished", **more: Any
) -> TrialRecord:
    settings = {KEY: more.pop("temperature", 0.1)} | more
    measured = {"knn_top1": value, "linear_top1": value, "rankme": 10 * value, "lidar": -value, "alignment": 1 - value,
                "uniformity": 0.0, "alignment_uniformity": 1 - value}  # fmt: skip
    scores = [Score(step, 1, step * 64, measured, 1.0) for step in steps]
    return TrialRecord(name, [Generation(f"/x/{name}/gen-1", settings)], scores, status)


def test_a_record_survives_its_file_with_nan_and_origins(tmp_path: Path) -> None:
    record = trial("a", math.nan)
    record.generations.append(Generation("/x/a/gen-2", {KEY: 0.3}, Place("/x/b/gen-1", 5)))
    record.write(str(tmp_path / "a"))
    found = read_record(str(tmp_path / "a"))
    assert found is not None
    assert found.generations == record.generations
    assert found.settings == {KEY: 0.3}
    assert math.isnan(found.scores[0].measures["knn_top1"])
    assert "NaN" not in (tmp_path / "a" / "trial.json").read_text()
    assert read_record(str(tmp_path / "b")) is None
    assert [one.name for one in read_records(str(tmp_path))] == ["a"]


def test_a_trial_goes_on_in_the_life_it_has_unless_it_is_given_other_values_or_anothers_checkpoint() -> None:
    record, cool, warm = TrialRecord("a"), {KEY: 0.1}, {KEY: 0.2}
    first = record.life("/x/a", cool, None)
    assert first == Generation("/x/a/gen-1", cool, None)
    assert record.life("/x/a", cool, None) is first  # restarted before its first score
    assert record.life("/x/a", cool, Place("/x/a/gen-1", 5)) is first  # and after it
    others = Place("/x/b/gen-1", 10)
    second = record.life("/x/a", warm, others)
    assert second == Generation("/x/a/gen-2", warm, others)
    assert record.life("/x/a", warm, others) is second  # restarted before it scored anything
    assert record.life("/x/a", warm, Place("/x/a/gen-2", 15)) is second
    third = record.life("/x/a", warm, Place("/x/b/gen-1", 20))  # the same values, but from further on
    assert third.run == "/x/a/gen-3"
    again = record.life("/x/a", cool, Place("/x/a/gen-1", 5))  # Tune's state is older than the record
    assert again == Generation("/x/a/gen-4", cool, Place("/x/a/gen-1", 5))


def test_row_48_nan_failed_and_unscored_trials_are_worst() -> None:
    records = [
        trial("nan", math.nan),
        trial("good", 0.4),
        trial("better", 0.5, temperature=0.2),
        trial("failed", 0.9, status="failed"),
        trial("none", 1.0, steps=()),
    ]
    assert [one.name for one in results.ranked(records, "knn_top1")][:2] == ["better", "good"]
    assert [one.name for one in choose(records, "knn_top1", 5)] == ["better", "good"]
    assert [one.name for one in choose(records, "alignment", 5)] == ["better", "good"]
    assert trial("failed", 0.9, status="failed").objective("knn_top1") == WORST


def test_finalists_are_of_different_settings_and_other_than_the_given_ones() -> None:
    records = [trial("a", 0.5), trial("b", 0.4), trial("c", 0.3, temperature=0.2)]
    assert [one.name for one in choose(records, "knn_top1", 2)] == ["a", "c"]
    assert [one.name for one in choose(records, "knn_top1", 2, but={KEY: 0.1})] == ["c"]


def test_a_trial_that_was_ended_early_is_behind_whole_ones() -> None:
    """RankMe of a network that has learned nothing is the highest of all."""
    records = [trial("early", 0.9, steps=(5,), status="stopped early"), trial("whole", 0.4), trial("worse", 0.3),
               trial("earliest", 0.8, steps=(2,), status="stopped early")]  # fmt: skip
    assert [one.name for one in results.ranked(records, "rankme")] == ["whole", "worse", "early", "earliest"]
    assert [one.name for one in choose(records, "rankme", 1)] == ["whole"]
    assert [one.name for one in results.front(records, "rankme", "lidar")] == ["whole", "worse"]
    assert [one.name for one in results.front([records[0], records[3]], "rankme", "knn_top1")] == ["early"]


def test_finalists_and_the_given_configuration_train_by_seeds_that_the_search_did_not_use() -> None:
    spec = load_space({"space": {KEY: {"uniform": [0.1, 1]}}, "trials": 2, "seeds": 2, "objective": {"every": 5}})
    assert cases([("a", {KEY: 0.3})], spec, 7) == [
        ("as-given-seed-8", {"run.seed": 8}),
        ("as-given-seed-9", {"run.seed": 9}),
        ("a-seed-8", {KEY: 0.3, "run.seed": 8}),
        ("a-seed-9", {KEY: 0.3, "run.seed": 9}),
    ]


def test_means_and_spreads_are_over_seeds_that_did_not_fail() -> None:
    again = [trial("as-given-seed-8", 0.1), trial("as-given-seed-9", 0.3), trial("a-seed-8", 0.5),
             trial("a-seed-9", math.nan)]  # fmt: skip
    first, second = summarise([("a", {KEY: 0.3})], again, "knn_top1")
    assert (first.name, first.mean, first.spread) == (GIVEN, pytest.approx(0.2), pytest.approx(0.1 * math.sqrt(2)))
    assert (second.name, second.values, second.failed) == ("a", (0.5,), 1)  # a lucky survivor does not win
    assert math.isnan(second.spread)


def test_the_verdict_says_whether_the_lead_exceeds_the_spread() -> None:
    def of(name: str, *values: float) -> Finalist:
        return Finalist(name, {}, values)

    assert "leads b by 0.2, which exceeds the spread over 2 seeds, 0.01414" in verdict(
        [of("a", 0.5, 0.52), of("b", 0.3, 0.32)]
    )
    text = verdict([of("a", 0.4, 0.6), of("b", 0.35, 0.55)])
    assert "does not exceed" in text
    assert "take them for equal" in text
    assert "nobody knows" in verdict([of("a", 0.4), of("b", 0.3)])
    lucky = verdict([of("b", 0.2, 0.22), of("c", 0.1, 0.12), Finalist("a", {}, (0.9, 0.91), failed=1)])
    assert lucky.startswith("b leads c by 0.1, which exceeds")
    assert lucky.endswith("; set aside, for a seed of theirs failed: a")
    assert "set aside" not in verdict([Finalist("a", {}, (0.9, 0.91), 1), Finalist("b", {}, (0.5, 0.6), 1)])
    assert "with 3 and 1 seeds" in verdict([of("a", 0.4, 0.4, 0.4), of("b", 0.3)])
    assert "only finalist" in verdict([of("a", 0.4, 0.5), of("b")])
    assert "no finalist" in verdict([of("a")])


def test_the_best_configuration_is_taken_by_pretrain_as_it_is(data_set: Manifest, tmp_path: Path) -> None:
    """That it trains is shown by tests/faults/test_search_faults.py."""
    config = small_run(tmp_path / "run", data_set, train__steps=10)
    uri = results.write_best(str(tmp_path), config, {KEY: 0.25, "views.strength": 0.75})
    best = load_config(uri)
    assert best.loss.temperature == 0.25
    assert best.views.strength == 0.75
    assert best.run.folder == str(tmp_path / "best")
    assert best.run.seed == config.run.seed
    assert best.model == config.model
    assert best.data.train == data_set.folder


def test_all_scores_are_in_the_table_and_a_trial_without_one_too(tmp_path: Path) -> None:
    records = [trial("a", 0.5, note="x"), trial("b", math.nan, steps=(), status="failed", note=3)]
    records[1].why = "why"
    uri = results.write_table(str(tmp_path), records, [KEY, "note"])
    rows = pq.read_table(io.BytesIO(Path(uri).read_bytes())).to_pylist()
    assert [(row["trial"], row["step"], row["knn_top1"]) for row in rows] == [
        ("a", 5, 0.5),
        ("a", 10, 0.5),
        ("b", None, None),
    ]
    assert rows[0]["note"] == '"x"'
    assert rows[0][KEY] == 0.1
    assert rows[2]["why"] == "why"


def test_label_free_measures_are_compared_with_labelled_ones_over_whole_trials() -> None:
    records = [trial(str(i), i / 10) for i in range(1, 6)] + [trial("early", 0.9, steps=(5,), status="stopped early")]
    lines = results.label_free_lines(records)
    assert "over 5 trials of full length" in lines[0]
    assert "  rankme: 1 with knn_top1, 1 with linear_top1" in lines
    assert "  lidar: -1 with knn_top1, -1 with linear_top1" in lines
    assert "  alignment: 1 with knn_top1, 1 with linear_top1" in lines
    assert "  uniformity: - with knn_top1, - with linear_top1" in lines
    assert results.label_free_lines(records[:3]) == []


def test_trials_that_none_beats_in_two_objectives_are_starred() -> None:
    """By rankme all is reversed here, so the front is whoever is best at something: all but the ones beaten in both."""
    records = [trial(name, value) for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    records += [trial("beaten", 0.15), trial("failed", 0.9, status="failed"), trial("nan", math.nan)]
    for one in records:
        for score in one.scores:
            measured: Any = score.measures
            measured["rankme"] = 0.0 if one.name == "beaten" else 1 - measured["knn_top1"]
    assert [one.name for one in results.front(records, "knn_top1", "rankme")] == ["c", "b", "a"]
    header, rows = results.trial_rows(records, [KEY], "knn_top1", "rankme")
    assert header[-3:] == ["knn_top1", "rankme", "status"]
    assert {row[0] for row in rows if row[-1].endswith("*")} == {"a", "b", "c"}
    (line,) = results.front_lines(records, "knn_top1", "rankme")
    assert line == "* no trial beats these 3 in both knn_top1 and rankme: c, b, a"
    assert results.front_lines(records, "knn_top1", None) == []
    assert results.trial_rows(records, [KEY], "knn_top1")[0][-2:] == ["knn_top1", "status"]


class Outside(HTMLParser):
    """Collects what a page would ask a network for, and whether it runs anything."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data") and not (value or "").startswith("data:"):
                self.found.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.found.append(f"{tag} {name}")


def test_the_page_is_one_file_that_asks_nobody_and_escapes_what_it_shows(data_set: Manifest, tmp_path: Path) -> None:
    config = small_run(tmp_path / "run", data_set, train__steps=10)
    spec = load_space({"space": {KEY: {"loguniform": [0.05, 1]}, "optim.rule": {"choice": ["linear", "sqrt"]}},
                       "trials": 4, "objective": {"every": 5}})  # fmt: skip
    evil = "<script>alert(1)</script>"

    def page_of(one: SearchSpec) -> Page:
        return Page(config, one, records, again, {KEY: 0.1, "views.strength": 0.1}, "knn_top1", data_set)

    records = [trial(f"t{i}{evil}", 0.1 * i, temperature=0.1 * i, **{"optim.rule": "sqrt"}) for i in range(1, 6)]
    records.append(trial("bad", math.nan, steps=(), status="failed", **{"optim.rule": "sqrt"}))
    records[-1].why = evil
    again = [Finalist("t1", {KEY: 0.1}, (0.5, 0.6)), Finalist(GIVEN, {}, (0.1, 0.2))]
    text = render(page_of(spec), "/folder")
    page = Outside()
    page.feed(text)
    assert page.found == []
    assert "script" not in page.tags
    assert evil not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 2 * 2 * 6
    assert text.count("<polyline") == 5 + 5  # a line a trial across the axes, and one over the steps
    assert "unbeaten" not in text
    assert [_is_log(page_of(spec), key) for key in spec.space] == [True, False]
    lists = load_space({"space": {KEY: {"grid": [0.02, 0.1, 5.0]}, "views.strength": {"grid": [0.0, 0.5]},
                                  "optim.rule": {"grid": ["linear", "sqrt"]}, "model.zero_init_last":
                                  {"grid": [True, False]}}, "searcher": "grid", "objective": {"every": 5}})  # fmt: skip
    assert [_is_log(page_of(lists), key) for key in lists.space] == [True, False, False, False]
    spec = load_space({"space": spec.model_dump(exclude_none=True)["space"], "trials": 4, "searcher": "tpe",
                       "objective": {"every": 5, "also": "lidar"}})  # fmt: skip
    text = render(Page(config, spec, records, again, {KEY: 0.1}, "knn_top1", data_set), "/folder")
    assert "<h2>knn_top1 against lidar</h2>" in text
    assert "unbeaten in both: 5" in text  # lidar falls as knn_top1 rises
    assert text.count("<polyline") == 5 + 5 + 1
    assert evil not in text
    assert "exceeds the spread" in text


def test_scales_put_numbers_along_their_range_and_names_side_by_side() -> None:
    log = Scale([0.01, 0.1, 1.0], log=True)
    assert [log.at(one) for one in (0.01, 0.1, 1.0)] == pytest.approx([0, 0.5, 1])
    assert [Scale([1, 3]).at(one) for one in (1, 2, 3)] == [0, 0.5, 1]
    assert Scale(["b", "a"]).at("a") < Scale(["b", "a"]).at("b")
    assert Scale([2.0]).at(2.0) == 0.5
    assert [name for _, name in Scale([0.01, 1.0], log=True).ticks()] == ["0.01", "0.0316", "0.1", "0.316", "1"]


def test_charts_of_nothing_are_empty_and_not_an_error() -> None:
    assert "<polyline" not in parallel([Axis("a"), Axis("b")], [])
    assert "<circle" not in plot([], x=Axis("a"), y=Axis("b"), joined=True)
    assert "<polyline" in parallel([Axis("a"), Axis("b")], [Line("n", [1, "x"], 1.0)])
