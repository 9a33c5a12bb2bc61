"""Claim: every panel of cluster/grafana.json shows a run, and every alert can be evaluated, by a real Prometheus.

    python -m benchmarks.board [--steps 2000] [--output FILE] [--picture FILE]

A Ray head of its own, a Prometheus that scrapes it every second (Debian: `apt-get install prometheus`), and
`simclr-ray pretrain` on images of which a few are broken; one worker process is killed in the middle. Then each panel's
queries are asked for as Grafana asks for them, over the time of the run. Prints what each panel's lines begin and end
with; writes benchmarks/results/board.json and, where Chromium and playwright are installed, docs/images/board.png: the
panels in their places. It is not a picture of Grafana, which is not needed for it: of a board Grafana adds the frame.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from benchmarks.machine import machine
from simclr_ray.data.shards import ImageRow
from simclr_ray.publish.charts import Axis, Series, line_chart, short
from tests.conftest import make_data_set, real_rows
from tests.faults.commands import INJECT, injected, recipe, started
from tests.servers.prometheus import Line, binary, prometheus
from tests.servers.ray_head import ray_head
from tests.unit.observe.board import ALERTS, board_panels, panels

ROOT = Path(__file__).parents[1]
RESULT, PICTURE = ROOT / "benchmarks/results/board.json", ROOT / "docs/images/board.png"
IMAGES, BROKEN = 4000, 4
STEP_S = 1.0
PAGE = """<!doctype html><meta charset="utf-8"><style>{style}
body {{ width: 1440px; padding: 10px; }}
.board {{ display: grid; grid-template-columns: repeat(24, 1fr); gap: 8px; }}
.panel {{ background: var(--raised); border: 1px solid var(--rule); border-radius: 6px; padding: 6px 10px; }}
.panel figure {{ margin: 0; border: 0; padding: 0; }} .panel output {{ display: none; }}
.panel big {{ display: block; text-align: center; font-size: 2.2rem; color: var(--good); }}
</style><div class="board">{panels}</div>"""


def run(folder: Path, steps: int, environment: Mapping[str, str], address: str) -> tuple[float, float]:
    """Train; Unix times of begin and end."""
    rows = real_rows(IMAGES)
    for place in range(0, IMAGES, IMAGES // BROKEN):
        rows[place] = ImageRow(b"no picture", None, f"broken-{place}.png")
    manifest = make_data_set(folder / "images", rows, unit_rows=64, shard_rows=1000)
    file = recipe(
        folder / "board", manifest, train__steps=steps, train__checkpoint_every=steps // 8, evaluate__every=steps // 8,
        cluster__address=address, cluster__workers=1, cluster__max_failures=2,
    )  # fmt: skip
    os.environ.update(environment)
    began = time.time()
    with started(file) as process:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run has ended with {process.returncode}:\n{output[-3000:]}")
    return began, time.time()


def told(line: Line) -> dict[str, float]:
    """How a line begins and ends."""
    finite = [value for value in line.values if math.isfinite(value)]
    return {"points": len(line.values), "first": finite[0], "last": finite[-1]} if finite else {"points": 0}


def drawn(panel: Mapping[str, Any], lines: Sequence[tuple[str, Line]], began: float) -> Markup:
    """A panel in its place."""
    place = panel["gridPos"]
    where = f"grid-column: {place['x'] + 1} / span {place['w']}; grid-row: {place['y'] + 1} / span {place['h']}"
    unit = {"percentunit": "fraction", "s": "s"}.get(panel["fieldConfig"]["defaults"]["unit"], "")
    if panel["type"] == "stat":
        value = short(round(lines[0][1].values[-1], 2)) if lines else "no data"
        inner = Markup("<h3>{}</h3><big>{} {}</big>").format(panel["title"], value, unit)
    else:
        series = [Series(name, [at - began for at in line.times], line.values, colour)
                  for colour, (name, line) in enumerate(lines)]  # fmt: skip
        low = 0.0 if unit == "fraction" else None
        inner = line_chart(series, title=panel["title"], x=Axis("seconds since the start"), y=Axis(unit, low=low))
    return Markup('<div class="panel" style="{}">{}</div>').format(where, inner)


def photographed(page: str, file: Path) -> str | None:
    """Write a PNG of the page; why not, where that cannot be done."""
    try:
        from playwright.sync_api import sync_playwright

        from tests.integration.test_report_browser import chromium
    except ImportError:
        return "playwright is not installed"
    where = chromium()
    if where is None:
        return "there is no Chromium"
    file.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as player:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = player.chromium.launch(executable_path=where, args=arguments)
        shown = browser.new_page(viewport={"width": 1460, "height": 900})
        shown.set_content(page)
        shown.screenshot(path=str(file), full_page=True)
        browser.close()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of the run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: benchmarks/results/board.json")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default: docs/images/board.png")
    args = parser.parse_args()
    if binary() is None:
        print("not here: prometheus is not installed (Debian: apt-get install prometheus)")
        return 2
    asked: dict[str, list[tuple[str, Line]]] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        # Ray's processes hand it on to the workers, of which one dies of it.
        os.environ.update(
            injected("SIMCLR_RAY_FAULT", f"die rank=0 step={args.steps // 2} once={folder / 'died'}", INJECT)
        )
        head = stack.enter_context(ray_head(folder, token=None))
        endpoint = head.metrics.removeprefix("http://").removesuffix("/metrics")
        with prometheus(folder / "prometheus", endpoint, [ALERTS]) as server:
            began, ended = run(folder, args.steps, head.environment, head.gcs)
            time.sleep(3 * STEP_S)
            for title, queries in panels().items():
                asked[title] = [
                    (line.labels.get("__name__", "").removeprefix("ray_simclr_").replace("_", " "), line)
                    for query in queries
                    for line in server.range(query, began, ended, STEP_S)
                ]
            rules = server.rules()
    for title, lines in asked.items():
        print(f"{title}: {'; '.join(f'{name} {told(line)}' for name, line in lines) or 'NO DATA'}")
    print(f"alerts: {rules}")
    shown_panels = Markup("").join(drawn(panel, asked[panel["title"]], began) for panel in board_panels())
    style = (files("simclr_ray.publish") / "report.css").read_text()
    why_not = photographed(PAGE.format(style=style, panels=shown_panels), args.picture)
    if why_not:
        print(f"no picture: {why_not}")
    shown = {title: [{"line": name, **told(line)} for name, line in lines] for title, lines in asked.items()}
    result = {"machine": machine(), "seconds": ended - began, "panels": shown, "alerts": rules}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(asked.values()) and set(rules.values()) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
