"""Two charts as SVG text: parallel coordinates and points over axes. Pure; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 28, 40
TICKS = 5


@dataclass(frozen=True)
class Axis:
    """What is measured along it."""

    name: str
    log: bool = False


@dataclass(frozen=True)
class Line:
    """One trial across parallel axes."""

    name: str
    values: Sequence[Any]
    rank: float
    """0 for the worst to 1 for the best."""


class Scale:
    """From values to 0..1: numbers along their range, anything else by its place in a list."""

    def __init__(self, values: Sequence[Any], *, log: bool = False) -> None:
        """`values` are all that will be asked for."""
        numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values)
        self._log = log and numbers and all(one > 0 for one in values)
        self._names = None if numbers and values else sorted({str(one) for one in values})
        ends = [self._number(one) for one in values] if numbers else []
        self._low, self._high = (min(ends), max(ends)) if ends else (0.0, 1.0)

    def at(self, value: Any) -> float:
        """Where it lies."""
        if self._names is not None:
            return (self._names.index(str(value)) + 0.5) / max(1, len(self._names))
        span = self._high - self._low
        return (self._number(value) - self._low) / span if span else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Places with their names."""
        if self._names is not None:
            return [(self.at(name), name) for name in self._names]
        if self._high == self._low:
            return [(0.5, _short(self._back(self._low)))]
        return [
            (i / (TICKS - 1), _short(self._back(self._low + (self._high - self._low) * i / (TICKS - 1))))
            for i in range(TICKS)
        ]

    def _number(self, value: Any) -> float:
        return math.log(value) if self._log else float(value)

    def _back(self, value: float) -> float:
        return math.exp(value) if self._log else value


def parallel(axes: Sequence[Axis], lines: Sequence[Line]) -> str:
    """A vertical axis for each key and the objective, a line for each trial; blue is better."""
    scales = [Scale([line.values[i] for line in lines], log=axis.log) for i, axis in enumerate(axes)]
    xs = [LEFT + i * (WIDTH - LEFT - RIGHT - 60) / max(1, len(axes) - 1) for i in range(len(axes))]
    parts = []
    for line in lines:
        points = " ".join(
            f"{x:.1f},{_y(scale.at(value)):.1f}" for x, scale, value in zip(xs, scales, line.values, strict=True)
        )
        parts.append(_polyline(points, line.rank, line.name))
    for axis, scale, x in zip(axes, scales, xs, strict=True):
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#999"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 22, axis.name, "middle"))
        parts += [_text(x + 5, _y(place) + 4, name, "start") for place, name in scale.ticks()]
    return _svg(parts)


def plot(series: Sequence[tuple[str, Sequence[tuple[float, float]], float]], *, x: Axis, y: Axis, joined: bool) -> str:
    """Points of each series, joined by a line or not; a series is its name, its points and its rank from 0 to 1."""
    points = [point for _, of_series, _ in series for point in of_series]
    across, up = Scale([a for a, _ in points], log=x.log), Scale([b for _, b in points], log=y.log)
    parts = [
        f'<line x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}" stroke="#999"/>',
        f'<line x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{HEIGHT - BOTTOM}" stroke="#999"/>',
        _text(WIDTH / 2, HEIGHT - 4, x.name, "middle"),
        _text(LEFT, TOP - 10, y.name, "start"),
    ]
    if points:
        parts += [_text(_x(place), HEIGHT - BOTTOM + 16, name, "middle") for place, name in across.ticks()]
        parts += [_text(LEFT - 6, _y(place) + 4, name, "end") for place, name in up.ticks()]
    for name, of_series, rank in series:
        places = [(_x(across.at(a)), _y(up.at(b))) for a, b in of_series]
        if joined and len(places) > 1:
            parts.append(_polyline(" ".join(f"{a:.1f},{b:.1f}" for a, b in places), rank, name))
        parts += [
            f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{_colour(rank)}">{_tip(name)}</circle>'
            for a, b in places
        ]
    return _svg(parts)


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">' + "".join(parts) + "</svg>"


def _polyline(points: str, rank: float, name: str) -> str:
    opacity = f"{0.35 + 0.65 * rank:.2f}"
    return (
        f'<polyline class="line" points="{points}" stroke="{_colour(rank)}" opacity="{opacity}">{_tip(name)}</polyline>'
    )


def _tip(name: str) -> str:
    return f"<title>{escape(name)}</title>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x(place: float) -> float:
    return LEFT + 12 + place * (WIDTH - LEFT - RIGHT - 24)


def _y(place: float) -> float:
    return HEIGHT - BOTTOM - 6 - place * (HEIGHT - TOP - BOTTOM - 12)


def _colour(rank: float) -> str:
    """From light gray to a dark blue, which colour-blind readers tell apart too."""
    light, dark = (0xC8, 0xCC, 0xD0), (0x00, 0x4B, 0x87)
    return "#" + "".join(f"{round(a + (b - a) * rank):02x}" for a, b in zip(light, dark, strict=True))


def _short(value: float) -> str:
    return f"{value:.3g}"
