"""Charts: honest axes, every value where it belongs, and nothing of a stranger's in the markup."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import hypothesis
import pytest
from hypothesis import strategies as st
from markupsafe import Markup

from simclr_ray.publish.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    line_chart,
    plane,
    reduced,
    scatter,
    short,
    spans,
    ticks,
)

HOSTILE = "\"><script>alert(1)</script>'&<img src=x onerror=alert(2)>"
finite = st.floats(-1e9, 1e9, allow_nan=False)


def svg(markup: Markup) -> ElementTree.Element:
    """The drawing, parsed strictly: what is not well formed raises."""
    found = re.search(r'<svg viewBox="0 0 \d+ \d+" role="img".*</svg>', markup, flags=re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


def line(markup: Markup) -> list[tuple[float, float]]:
    (path,) = svg(markup).iter("path")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attrib["d"])]


@hypothesis.given(low=finite, width=st.floats(1e-6, 1e9))
def test_ticks_are_round_inside_and_evenly_apart(low: float, width: float) -> None:
    hypothesis.assume(low + width > low and width > 1e-6 * abs(low))
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 6
    slack = 1e-6 * width
    assert all(low - slack <= one <= low + width + slack for one in found)
    steps = [b - a for a, b in pairwise(found)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-3) for step in steps)
    if steps:
        assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6), 3) in (1, 2, 5)


@hypothesis.given(st.lists(finite, min_size=1, max_size=2000))
def test_a_long_line_is_made_shorter_and_keeps_its_mean(values: list[float]) -> None:
    few = reduced(Series("a", list(range(len(values))), values), buckets=50)
    assert len(few.x) == len(few.y) == min(50, len(values))
    assert sorted(few.x) == list(few.x)
    if len(values) % 50 == 0:  # else the buckets weigh differently
        assert math.isclose(sum(few.y) / len(few.y), sum(values) / len(values), rel_tol=1e-6, abs_tol=1e-3)


def test_values_stand_where_the_axes_say() -> None:
    whole = Axis("%", low=0, high=100)
    chart = line_chart([Series("a", [0, 50, 100], [0, 25, 100])], title="t", x=whole, y=whole)
    left, right, bottom, top = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    expected = [left, bottom, (left + right) / 2, bottom + (top - bottom) / 4, right, top]
    assert [value for point in line(chart) for value in point] == pytest.approx(expected, abs=0.06)


def test_a_logarithmic_axis_has_whole_powers_and_leaves_out_what_has_no_logarithm() -> None:
    chart = line_chart([Series("a", [0, 1, 2], [10, 0, 1000])], title="t", x=Axis("x"), y=Axis("y", log=True))
    assert [y for _, y in line(chart)] == pytest.approx([HEIGHT - BOTTOM, TOP], abs=0.06)
    written = [text.text for text in svg(chart).iter("text")]
    assert {"10", "100", "1000"} <= set(written)


def test_nan_leaves_a_gap_and_a_line_of_nothing_else_is_left_out() -> None:
    gap = line_chart([Series("a", [0, 1, 2], [1, math.nan, 2])], title="t", x=Axis("x"), y=Axis("y"))
    (path,) = svg(gap).iter("path")
    assert path.attrib["d"].count("M") == 2
    assert "NaN" not in gap
    assert "nan" not in gap
    assert line_chart([Series("a", [0], [math.nan])], title="t", x=Axis("x"), y=Axis("y")) == ""


def test_the_axis_reaches_to_a_level_line() -> None:
    chart = line_chart([Series("a", [0, 1], [1, 2])], title="t", x=Axis("x"), y=Axis("y"), level=(6.0, "chance"))
    (level,) = (one for one in svg(chart).iter("line") if one.attrib["class"] == "level")
    assert TOP < float(level.attrib["y1"]) < min(y for _, y in line(chart))


def test_equal_values_and_single_ones_can_be_drawn() -> None:
    for values in ([3.0], [3.0, 3.0], [0.0, 0.0]):
        assert line(line_chart([Series("a", range(len(values)), values)], title="t", x=Axis("x"), y=Axis("y")))
    assert svg(scatter([(1.0, 1.0, 0)], title="t", x_title="x", y_title="y", summary="one"))


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_names_are_text_wherever_they_stand() -> None:
    series = [Series(HOSTILE, [0, 1], [1, 2]), Series("b", [0, 1], [1, 3])]
    charts = (
        line_chart(series, title=HOSTILE, x=Axis(HOSTILE), y=Axis(HOSTILE), level=(1.5, HOSTILE)),
        scatter(
            [(0, 1, 0), (1, 2, -1)], title=HOSTILE, x_title=HOSTILE, y_title=HOSTILE, tips=[HOSTILE, ""],
            summary=HOSTILE,
        ),
        plane([(HOSTILE, 1.0, 2.0, 0)], title=HOSTILE, x=Axis(HOSTILE), y=Axis(HOSTILE)),
        spans([(HOSTILE, 0.0, 1.0, HOSTILE)], title=HOSTILE, x_title=HOSTILE),
    )  # fmt: skip
    for chart in charts:
        svg(chart)
        for tag, attributes in Elements(chart).found:
            assert tag not in ("script", "img")
            assert not any(name.startswith("on") for name in attributes)
    data = next(attributes["data-chart"] for _, attributes in Elements(charts[0]).found if "data-chart" in attributes)
    assert json.loads(str(data))["series"][0]["name"] == HOSTILE


def test_numbers_of_axes_are_short() -> None:
    assert [short(value) for value in (0, 0.05, 12, 250_000, 1.2e6, 3e-5, 2e9)] == [
        "0", "0.05", "12", "250k", "1.2M", "3e-05", "2G",
    ]  # fmt: skip
