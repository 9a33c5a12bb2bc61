"""README's numbers of the views are those that the benchmark measured last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "views.json").read_text())
CASES: dict[str, dict[str, Any]] = MEASURED["speed"]["cases"]
OURS = ("ours", "ours, by OpenCV", "ours, by torch")
OTHERS = ("AlbumentationsX", "lightly", "torchvision v1, Pillow's blur")
LIMIT = "decode alone"


def heads() -> dict[str, str]:
    return {name: f"| {name} -> {case['view']} |" for name, case in CASES.items()}


def speed_rows() -> list[str]:
    """Images a second, a row a case."""
    rows = []
    for name, head in heads().items():
        pipelines = CASES[name]["pipelines"]
        cells = [f"{pipelines[one]['images_a_second']:,.0f}" for one in (*OURS, *OTHERS, LIMIT)]
        rows.append(" ".join([head, *(f"{cell} |" for cell in cells)]))
    return rows


def ratio_rows() -> list[str]:
    """Of our makers of views to the best peer, and of the kernel to the decoder."""
    rows = []
    for name, head in heads().items():
        ratios = {one: CASES[name]["pipelines"][one]["ratios"] for one in OURS}
        cells = [f"{ratios[one]['speed_to_best_peer']:.2f}" for one in OURS]
        cells.append(f"{ratios['ours']['share_of_decode_limit']:.0%}")
        rows.append(" ".join([head, *(f"{cell} |" for cell in cells)]))
    return rows


def test_the_tables_of_the_views_are_the_measured_ones() -> None:
    for rows in (speed_rows(), ratio_rows()):
        table = "\n".join(rows)
        assert table + "\n\n" in README, f"README.md should have:\n{table}"


def test_what_is_said_beside_the_tables_was_measured() -> None:
    assert "which is AlbumentationsX each time" in README
    assert {case["best_peer"] for case in CASES.values()} == {"AlbumentationsX"}
    photographs = [case["pipelines"] for case in CASES.values() if case["view"] == 224]
    slower = [1 / one["ours, by torch"]["ratios"]["speed_to_best_peer"] for one in photographs]
    assert f"photographs take {min(slower):.1f} to {max(slower):.1f} times as long as by AlbumentationsX" in README
    whole = MEASURED["fidelity"]["differences"]["whole view, 500 x 375"]
    ours, theirs = whole["ours"]["mean"], whole["torchvision, Pillow"]["mean"]
    assert f"our views are off by {ours:.2f} levels of 255 on average, torchvision's by {theirs:.1f}." in README
