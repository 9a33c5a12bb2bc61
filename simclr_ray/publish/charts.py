"""Charts as inline SVG: lines, points, and spans of time. Numbers in, markup out; nothing is read.

Made here and not by matplotlib, whose SVG has its colours inside: these take theirs from the page's style, so one file
is right in light and dark, its text stays text, and reports need no further package. Every string is escaped by
`markupsafe`; a chart says its unit, and its axes begin where it says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 34
COLOURS = 8
"""Colours of the style, `s0` to `s7`; a report has no more runs."""
_BUCKETS = 240
"""Points of a line, at most: about two pixels each."""


@dataclass(frozen=True)
class Series:
    """A line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    """NaN leaves a gap."""
    colour: int = 0
    dashed: bool = False
    points: bool = False
    """Mark each value: for few values far apart."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows."""

    title: str
    low: float | None = None
    """Where it begins; None lets the values decide."""
    high: float | None = None
    log: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x: Axis,
    y: Axis,
    resumed: Sequence[float] = (),
    level: tuple[float, str] | None = None,
) -> Markup:
    """Lines over a common x.

    Args:
        series: What to draw; one without finite values is left out.
        title: Above the chart.
        x: The axis below.
        y: The axis at the left; its title is the unit.
        resumed: Places of dotted upright lines: where an attempt began.
        level: A dotted level line and what it is; the axis reaches to it.

    Returns:
        A `<figure>`, or nothing where there is nothing to draw.
    """
    drawn = [reduced(one) for one in series]
    drawn = [one for one in drawn if any(math.isfinite(value) and (value > 0 or not y.log) for value in one.y)]
    if not drawn:
        return Markup("")
    across = _Scale.over([value for one in drawn for value in one.x], x, LEFT, WIDTH - RIGHT)
    up = _Scale.over(
        [*(value for one in drawn for value in one.y), *([level[0]] if level else [])], y, HEIGHT - BOTTOM, TOP
    )
    parts = [_grid(across, up, x.title)]
    for place in resumed:
        if across.low < place < across.high:
            parts.append(_line("resumed", across(place), TOP, across(place), HEIGHT - BOTTOM))
    if level:
        at = up(level[0])
        parts.append(_line("level", LEFT, at, WIDTH - RIGHT, at))
        parts.append(_text("label", LEFT + 5, at - 4 if at > TOP + 14 else at + 12, level[1]))
    parts += [_path(one, across, up) for one in drawn]
    parts.append(_line("cursor", LEFT, TOP, LEFT, HEIGHT - BOTTOM))
    values = [{"name": one.name, "x": _rounded(one.x), "y": _rounded(one.y)} for one in drawn]
    frame = {"left": LEFT, "right": WIDTH - RIGHT, "low": across.low, "high": across.high, "log": x.log}
    data = json.dumps({"series": values, "frame": frame, "unit": y.title, "x": x.title}, allow_nan=False)
    return _figure(title, y.title, parts, _summary(drawn, y.title), kind="lines", data=data, legend=drawn)


def scatter(
    points: Sequence[tuple[float, float, int]],
    *,
    title: str,
    x_title: str,
    y_title: str,
    tips: Sequence[str] | None = None,
    summary: str,
) -> Markup:
    """Points of an unlabelled plane, with equal steps on both axes.

    Args:
        points: (x, y, colour) of each, one at least; a colour below 0 is gray.
        title: Above the chart.
        x_title: Of the axis below.
        y_title: Of the axis at the left.
        tips: What each point is.
        summary: For readers who do not see it.
    """
    size = WIDTH - LEFT - RIGHT
    bottom = TOP + size
    ranges = [(min(values), max(values)) for values in zip(*((a, b) for a, b, _ in points), strict=True)]
    middle_x, middle_y = ((low + high) / 2 for low, high in ranges)
    step = size / (1.06 * max(high - low for low, high in ranges) or 1.0)

    parts = [
        _line("axis", LEFT, bottom, WIDTH - RIGHT, bottom),
        _line("axis", LEFT, TOP, LEFT, bottom),
        _text("title", (LEFT + WIDTH - RIGHT) / 2, bottom + 22, x_title, anchor="middle"),
        Markup('<text class="title" text-anchor="middle" transform="translate({:.1f} {:.1f}) rotate(-90)">{}</text>')
        .format(LEFT - 14, TOP + size / 2, y_title),
    ]  # fmt: skip
    circle = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.2" data-i="{}">{}</circle>')
    for i, (a, b, colour) in enumerate(points):
        tip = Markup("<title>{}</title>").format(tips[i]) if tips else Markup("")
        name = f"p{colour}" if colour >= 0 else "none"
        parts.append(
            circle.format(name, LEFT + size / 2 + step * (a - middle_x), TOP + size / 2 - step * (b - middle_y), i, tip)
        )
    return _figure(title, "", parts, summary, kind="points", height=bottom + BOTTOM)


def plane(marks: Sequence[tuple[str, float, float, int]], *, title: str, x: Axis, y: Axis) -> Markup:
    """A few named points (name, x, y, colour) of a plane with two measured axes."""
    if not marks:
        return Markup("")
    across = _Scale.over([mark[1] for mark in marks], x, LEFT, WIDTH - RIGHT, margin=0.12)
    up = _Scale.over([mark[2] for mark in marks], y, HEIGHT - BOTTOM, TOP, margin=0.12)
    parts = [_grid(across, up, x.title)]
    for name, a, b, colour in marks:
        left = across(a) > (LEFT + WIDTH) * 0.6
        parts.append(Markup('<circle class="s{} dot" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(colour, across(a), up(b)))
        parts.append(
            _text("label", across(a) + (-9 if left else 9), up(b) + 4, name, anchor="end" if left else "start")
        )
    return _figure(title, y.title, parts, "; ".join(f"{n}: {a:.3g}, {b:.3g}" for n, a, b, _ in marks), kind="plane")


def spans(rows: Sequence[tuple[str, float, float, str]], *, title: str, x_title: str) -> Markup:
    """Bars over time: (name, begin, end, what) each, times in one unit from a common zero."""
    if not rows:
        return Markup("")
    row, height = 22, TOP + 22 * len(rows) + BOTTOM
    end = max(max(row[2] for row in rows), 1e-9)
    across = _Scale.over([0.0, end], Axis(x_title, low=0.0, high=end), LEFT + 22, WIDTH - RIGHT)
    parts = [_line("axis", LEFT + 22, height - BOTTOM, WIDTH - RIGHT, height - BOTTOM)]
    for value in across.ticks():
        parts.append(_line("grid", across(value), TOP, across(value), height - BOTTOM))
        parts.append(_text("tick", across(value), height - BOTTOM + 13, across.written(value), anchor="middle"))
    parts.append(_text("title", (LEFT + WIDTH) / 2, height - 4, x_title, anchor="middle"))
    bar = Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="14" rx="2"><title>{}</title></rect>')
    for number, (name, begin, stop, what) in enumerate(rows):
        y = TOP + row * number
        parts.append(_text("tick", LEFT + 16, y + 13, name, anchor="end"))
        parts.append(bar.format(across(begin), y + 2, max(1.5, across(stop) - across(begin)), what))
    return _figure(title, "", parts, "; ".join(f"{name}: {what}" for name, _, _, what in rows), kind="spans",
                   height=height)  # fmt: skip


def reduced(series: Series, buckets: int = _BUCKETS) -> Series:
    """A line of at most so many points, each the mean of equally many values after another; NaN counts for none."""
    count = len(series.x)
    if count <= buckets:
        return series
    edges = [count * i // buckets for i in range(buckets + 1)]
    x = [sum(series.x[a:b]) / (b - a) for a, b in pairwise(edges)]
    y = [_mean([value for value in series.y[a:b] if math.isfinite(value)]) for a, b in pairwise(edges)]
    return Series(series.name, x, y, series.colour, series.dashed, series.points)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number of an axis: `0`, `0.05`, `250k`, `1.2M`, `3e-05`."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.0e}"
    for bound, unit, scale in ((1e4, "", 1.0), (1e6, "k", 1e3), (1e9, "M", 1e6), (1e12, "G", 1e9)):
        if size < bound:
            return f"{value / scale:.6g}{unit}" if unit else f"{value:.4g}"
    return f"{value:.2g}"


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], axis: Axis, start: float, stop: float, margin: float = 0.04) -> _Scale:
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not axis.log)]
        low, high = min(finite, default=1.0), max(finite, default=1.0)
        if axis.log:
            low, high = 10 ** math.floor(math.log10(low) + 1e-9), 10 ** math.ceil(math.log10(high) - 1e-9)
            high = high if high > low else 10 * low
        elif low == high:
            low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
        else:
            room = margin * (high - low)
            low, high = low - room, high + room
        low = low if axis.low is None else axis.low
        high = high if axis.high is None else axis.high
        return cls(low, high if high > low else low + 1, start, stop, axis.log)

    def __call__(self, value: float) -> float:
        if self.log:
            share = (math.log10(max(value, self.low)) - math.log10(self.low)) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.02, max(-0.02, share)) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        first, last = round(math.log10(self.low)), round(math.log10(self.high))
        every = max(1, -(-(last - first) // 5))
        return [10.0**power for power in range(first, last + 1, every)]

    def written(self, value: float) -> str:
        return f"{value:.0e}" if self.log and value >= 1e6 else short(value)


def _grid(across: _Scale, up: _Scale, x_title: str) -> Markup:
    parts = []
    for value in up.ticks():
        parts.append(_line("grid", LEFT, up(value), WIDTH - RIGHT, up(value)))
        parts.append(_text("tick", LEFT - 6, up(value) + 4, up.written(value), anchor="end"))
    for value in across.ticks():
        parts.append(_text("tick", across(value), HEIGHT - BOTTOM + 14, across.written(value), anchor="middle"))
    parts.append(_line("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM))
    parts.append(_text("title", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_title, anchor="middle"))
    return Markup("").join(parts)


def _path(series: Series, across: _Scale, up: _Scale) -> Markup:
    commands, pen = [], "M"
    dots = []
    for x, y in zip(series.x, series.y, strict=True):
        if not math.isfinite(y) or (up.log and y <= 0):
            pen = "M"
            continue
        commands.append(f"{pen}{across(x):.1f} {up(y):.1f}")
        pen = "L"
        if series.points or len(series.x) == 1:
            dot = Markup('<circle class="s{} dot" cx="{:.1f}" cy="{:.1f}" r="2.6"/>')
            dots.append(dot.format(series.colour, across(x), up(y)))
    line = Markup('<path class="s{}{}" d="{}"/>').format(
        series.colour, " dashed" if series.dashed else "", "".join(commands)
    )
    return line + Markup("").join(dots)


def _figure(
    title: str, unit: str, parts: Sequence[Markup], summary: str, *, kind: str, height: float = HEIGHT,
    data: str | None = None, legend: Sequence[Series] = (),
) -> Markup:  # fmt: skip
    keys = Markup("")
    if len(legend) > 1:
        key = Markup('<li><svg class="key" viewBox="0 0 22 8"><path class="s{}{}" d="M0 4L22 4"/></svg>{}</li>')
        items = [key.format(one.colour, " dashed" if one.dashed else "", one.name) for one in legend]
        keys = Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))
    return Markup(
        '<figure class="chart {kind}"{data}><figcaption>{title}{unit}</figcaption>{keys}'
        '<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{title}. {summary}">{parts}</svg>'
        "{readout}</figure>"
    ).format(
        kind=kind,
        data=Markup(' data-chart="{}"').format(data) if data else "",
        title=title,
        unit=Markup(" <span>{}</span>").format(unit) if unit else "",
        keys=keys,
        width=WIDTH,
        height=height,
        summary=summary,
        parts=Markup("").join(parts),
        readout=Markup('<output aria-live="off">&nbsp;</output>') if data else "",
    )


def _summary(series: Sequence[Series], unit: str) -> str:
    told = []
    for one in series:
        finite = [value for value in one.y if math.isfinite(value)]
        told.append(f"{one.name}: from {short(finite[0])} to {short(finite[-1])}")
    return "; ".join(told) + (f" ({unit})" if unit else "")


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(name, x1, y1, x2, y2)


def _text(name: str, x: float, y: float, text: str, *, anchor: str = "start") -> Markup:
    style: Mapping[str, object] = {"name": name, "x": x, "y": y, "anchor": anchor, "text": text}
    return Markup('<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>').format(**style)
