"""`search.html`: one file that shows a search, offline, with nothing to run: SVG and pictures inside, no script.

Every text passes `escape`, for values and names may be a stranger's; the page's own policy forbids all requests.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.data.manifest import Manifest
from simclr_ray.search import results
from simclr_ray.search.charts import Axis, Line, parallel, plot
from simclr_ray.search.finalists import Finalist, verdict
from simclr_ray.search.probe import read_originals
from simclr_ray.search.record import TrialRecord, ranked
from simclr_ray.search.space import SearchSpec, Settings, with_settings
from simclr_ray.train.derive import limits_of, policy_of
from simclr_ray.views.apply import two_views
from simclr_ray.views.draw import draw

NUM_SHOWN = 6
SHOWN_AT = 96
"""Side of a picture on the page, in pixels."""
DECADES = 20
"""Times the smallest of listed values that the largest is, from which on their axis is logarithmic."""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Search</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.2rem; font-size: 1.15rem }
table { border-collapse: collapse } td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
.wide { overflow-x: auto }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #444 }
.line { fill: none; stroke-width: 1.6 } .line:hover { stroke: #d55e00 !important; stroke-width: 4; opacity: 1 }
.dot:hover { fill: #d55e00 } .views img { width: calc(100% / 12 - 2px); min-width: 48px; margin: 1px }
.note { color: #666 }
</style></head><body>
"""


@dataclass(frozen=True)
class Page:
    """What is shown."""

    config: Config
    """As given."""
    spec: SearchSpec
    records: Sequence[TrialRecord]
    finalists: Sequence[Finalist]
    """Best first; none where none were trained again."""
    best: Settings
    """Values of the winner."""
    measure: str
    """The objective."""
    manifest: Manifest
    """Of the data set that trials train on, whose images are shown."""

    @property
    def also(self) -> str | None:
        """The second objective."""
        return self.spec.objective.also

    @property
    def keys(self) -> list[str]:
        """Of the space."""
        return list(self.spec.space)


def write_page(folder: str, page: Page) -> str:
    """Write the page into the folder of the search, and return where it is."""
    uri = storage.join(folder, "search.html")
    storage.write_bytes(uri, render(page, folder).encode())
    return uri


def render(page: Page, folder: str) -> str:
    """The page as text."""
    ended = [f"{sum(one.status == name for one in page.records)} {name}" for name in ("finished", "stopped early")]
    parts = [
        _HEAD,
        f"<h1>Search: {escape(results.named(page.measure))}</h1>",
        f'<p class="note">{escape(folder)}: {len(page.records)} trials, {", ".join(ended)}, '
        f"{sum(one.status == 'failed' for one in page.records)} failed; searcher {escape(page.spec.searcher)}, "
        f"scheduler {escape(page.spec.scheduler)}.</p>",
        "<h2>Trials</h2>",
        _table(*results.trial_rows(page.records, page.keys, page.measure, page.also)),
        *(f'<p class="note">{escape(line)}</p>' for line in results.front_lines(page.records, page.measure, page.also)),
    ]
    if page.finalists:
        parts += [
            "<h2>Trained again, by other seeds</h2>",
            _table(*results.finalist_rows(page.finalists, page.keys, page.measure)),
            f"<p>{escape(verdict(page.finalists))}.</p>",
        ]
    parts += ["<h2>Values and objective</h2>", _parallel(page)]
    parts += ["<h2>Objective over steps</h2>", _over_steps(page)]
    for key in page.keys:
        if any(isinstance(one.settings.get(key), (int, float)) for one in page.records):
            parts += [f"<h2>Objective against {escape(key)}</h2>", _against(page, key)]
    if page.also:
        parts += [f"<h2>{escape(page.measure)} against {escape(page.also)}</h2>", _both(page, page.also)]
    if lines := results.label_free_lines(page.records):
        parts += ["<h2>Without labels</h2>", *(f"<p>{escape(line)}</p>" for line in lines)]
    if lines := results.failures(page.records):
        parts += ["<h2>Failures</h2>", *(f"<p>{escape(line)}</p>" for line in lines)]
    return "\n".join([*parts, "<h2>Views</h2>", *_views(page), "</body></html>\n"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _scored(page: Page) -> list[tuple[TrialRecord, float]]:
    """Trials with a finite last score, worst first, so that the best is drawn on top."""
    found = [(one, one.scores[-1].measures.get(page.measure, math.nan)) for one in page.records if one.scores]
    finite = {one.name: value for one, value in found if math.isfinite(value)}
    return [(one, finite[one.name]) for one in reversed(ranked(page.records, page.measure)) if one.name in finite]


def _parallel(page: Page) -> str:
    scored = _scored(page)
    axes = [Axis(key, log=_is_log(page, key)) for key in page.keys]
    lines = [
        Line(one.name, [*(one.settings.get(key) for key in page.keys), value], rank / max(1, len(scored) - 1))
        for rank, (one, value) in enumerate(scored)
    ]
    return parallel([*axes, Axis(page.measure)], lines)


def _is_log(page: Page, key: str) -> bool:
    """Whether an axis is logarithmic: as its values were drawn, or as a list of them is spaced."""
    values = page.spec.space[key]
    if values.kind not in ("choice", "grid"):
        return values.kind in ("loguniform", "logint")
    numbers = [one for one in values.values if isinstance(one, (int, float)) and not isinstance(one, bool)]
    return len(numbers) == len(values.values) and min(numbers) > 0 and max(numbers) >= DECADES * min(numbers)


def _over_steps(page: Page) -> str:
    scored = _scored(page)
    curves = []
    for rank, (one, _) in enumerate(scored):
        points = [(score.step, score.measures.get(page.measure, math.nan)) for score in one.scores]
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        curves.append((_label(one), finite, rank / max(1, len(scored) - 1)))
    return plot(curves, x=Axis("step"), y=Axis(page.measure), joined=True)


def _against(page: Page, key: str) -> str:
    log = _is_log(page, key)
    scored = [(one, value) for one, value in _scored(page) if isinstance(one.settings.get(key), (int, float))]
    dots = [
        (_label(one), [(float(one.settings[key]), value)], rank / max(1, len(scored) - 1))
        for rank, (one, value) in enumerate(scored)
    ]
    return plot(dots, x=Axis(key, log=log), y=Axis(page.measure), joined=False)


def _both(page: Page, also: str) -> str:
    """Trials by both objectives, the unbeaten ones joined."""
    kept = results.front(page.records, page.measure, also)
    points = {one.name: (one.scores[-1].measures.get(also, math.nan), value) for one, value in _scored(page)}
    finite = [(one, points[one.name]) for one, _ in _scored(page) if math.isfinite(points[one.name][0])]
    dots = [(_label(one), [point], 0.3) for one, point in finite]
    edge = (f"unbeaten in both: {len(kept)}", [points[one.name] for one in kept], 1.0)
    return plot([*dots, edge], x=Axis(also), y=Axis(page.measure), joined=True)


def _label(one: TrialRecord) -> str:
    return f"{one.name}: " + ", ".join(f"{key}={results.shown(value)}" for key, value in one.settings.items())


def _views(page: Page) -> list[str]:
    """The winner's views beside those of the given configuration, of the same images."""
    out = []
    for title, settings in (("As given", {}), ("Winner", page.best)):
        words = ", ".join(f"{key}={results.shown(value)}" for key, value in settings.items()) or "the configuration"
        out.append(f"<p>{escape(title)}: {escape(words)}</p>")
        pictures = _pictures(with_settings(page.config, settings), page.manifest, page.spec.seed)
        out.append('<p class="views">' + "".join(f'<img alt="" src="{uri}">' for uri in pictures) + "</p>")
    return out


def _pictures(config: Config, manifest: Manifest, seed: int) -> list[str]:
    """Both views of some images, as data URIs."""
    policy = policy_of(config.views)
    images, ids = read_originals(manifest, limits_of(config.data), NUM_SHOWN, seed)
    sizes = np.array([image.shape[:2] for image in images])
    pairs = two_views(images, draw(policy, seed=config.run.seed, epoch=0, sample_ids=ids, sizes=sizes), policy)
    return [_data_uri(view) for pair in pairs for view in pair]


def _data_uri(view: Any) -> str:
    picture = PillowImage.fromarray(np.asarray(view, dtype=np.uint8))
    nearest = picture.width < SHOWN_AT // 2
    resample = PillowImage.Resampling.NEAREST if nearest else PillowImage.Resampling.LANCZOS
    buffer = io.BytesIO()
    picture.resize((SHOWN_AT, SHOWN_AT), resample).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
