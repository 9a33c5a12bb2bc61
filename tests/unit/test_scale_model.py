"""The model of benchmarks/scale.py: its laws, and its recorded points beside what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT, benchmark

RECORDED: dict[str, Any] = json.loads((ROOT / "benchmarks/results/scale.json").read_text())["model"]


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return benchmark("scale_model")


def work(scale: ModuleType, **changes: Any) -> Any:
    values = {
        "images": 4096,
        "dim": 128,
        "parameters": 10**6,
        "side": 32,
        "image_bytes": 1e4,
        "requests_an_image": 0.01,
    }
    return scale.Work(**(values | changes))


def rates(scale: ModuleType, **changes: Any) -> Any:
    values = {"encoder_s": 1e-3, "pair_s": 1e-12, "turn_s": 1e-4, "link_bytes_s": 1e9, "views_s": 1e-3, "get_s": 0.05,
              "read_bytes_s": 5e7}  # fmt: skip
    return scale.Rates(**(values | changes))


def test_one_worker_alone_sends_nothing(scale: ModuleType) -> None:
    times = scale.step_times(work(scale), rates(scale), workers=1, data_cores=4)
    assert times.gather == times.gradients == 0
    assert times.encoder == pytest.approx(4.096)
    assert times.loss == pytest.approx(8192 * 8192 * 128 * 1e-12)
    assert times.views == pytest.approx(4.096 / 4)
    assert times.read == pytest.approx(4096 * (0.01 * 0.05 + 1e4 / 5e7) / 4)


@given(st.integers(1, 64), st.integers(1, 64))
def test_workers_share_compute_and_what_they_receive_grows_to_the_whole(scale: ModuleType, few: int, more: int) -> None:
    a, b = (scale.step_times(work(scale), rates(scale), workers=w, data_cores=4) for w in (few, few + more))
    assert a.encoder * few == pytest.approx(b.encoder * (few + more))
    assert a.loss * few == pytest.approx(b.loss * (few + more))
    assert a.gather < b.gather
    whole = 2 * 4096 * 128 * 4 / 1e9
    assert b.gather - (few + more - 1) * 1e-4 < whole
    assert b.gradients - 2 * (few + more - 1) * 1e-4 < 2 * 4 * 10**6 / 1e9


def test_the_slowest_stage_is_named(scale: ModuleType) -> None:
    def slowest(**changes: Any) -> str:
        return str(scale.step_times(work(scale), rates(scale, **changes), workers=8, data_cores=8).slowest)

    assert slowest(encoder_s=1e-2) == "encoder"
    assert slowest(pair_s=1e-9) == "loss"
    assert slowest(turn_s=1.0) == "gradients"
    assert slowest(views_s=1.0) == "views"
    assert slowest(get_s=1e4) == "read"
    assert slowest(link_bytes_s=1e3, turn_s=0.0) in ("gradients", "ship")


def test_rates_are_found_again_from_what_they_make(scale: ModuleType) -> None:
    true = rates(scale, views_s=0.0, get_s=0.0, read_bytes_s=float("inf"))
    task = work(scale, images=scale.IMAGES, parameters=1000, image_bytes=0.0)
    points = []
    for ranks in (1, 2):
        times = scale.step_times(task, true, workers=ranks, data_cores=1)
        gathered = {size: scale.ring(size, true, ranks) for size in scale.GATHERED}
        points.append(scale.Measured(ranks, times.train, true.encoder_s, times.loss + times.gather, gathered, gathered))
    found = scale.fitted(*points)
    for name in ("encoder_s", "pair_s", "turn_s", "link_bytes_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)
    assert replace(found, turn_s=0.0) != found


def test_the_recorded_model_is_near_what_was_measured() -> None:
    """On ranks that it was not fitted to, too."""
    assert [row["ranks"] for row in RECORDED["checked"]] == [1, 2, 4, 8]
    for row in RECORDED["checked"]:
        fitted = row["ranks"] <= 2
        assert row["step_model_s"] == pytest.approx(row["step_s"], rel=0.03 if fitted else 0.3), row


def test_the_page_has_the_recorded_numbers() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    for row in RECORDED["checked"]:
        line = f"| {row['ranks']} | {row['step_s']:.2f} s | {row['step_model_s']:.2f} s |"
        assert line in page, line
    off = [row["step_model_s"] / row["step_s"] - 1 for row in RECORDED["checked"][2:]]
    assert f"It is {off[0]:.0%} too slow for four ranks and {off[1]:.0%} for eight.".replace("%", " %") in page
    for row in RECORDED["clusters"]:
        line = (
            f"| {row['workers']:,} | {row['images']:,} | {1000 * row['encoder']:.0f} | {1000 * row['loss']:.1f} | "
            f"{1000 * row['gather']:.0f} | {1000 * row['gradients']:.0f} | {row['efficiency']:.0%} | "
            f"{row['images_s']:,.0f} | {row['cores']:,.0f} | {row['requests_s']:,.0f} |"
        ).replace("%", " %")
        assert line in page, line
