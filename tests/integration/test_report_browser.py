"""A report in a real browser: it is clicked through, logs no error, runs no stranger's code and asks nobody."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simclr_ray import report
from simclr_ray.data.manifest import Manifest
from tests.unit.publish.made import made_run, results

pytestmark = pytest.mark.integration

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")


def chromium() -> str | None:
    """A browser of this machine, or the one that playwright has installed."""
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    with playwright.sync_playwright() as player:
        own = player.chromium.executable_path
    return own if Path(own).exists() else None


@pytest.fixture(scope="module")
def page_file(hostile_run: Path, data_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report about a real run full of hostile names, and another run beside it."""
    place = tmp_path_factory.mktemp("browser")
    other = made_run(place / "other", data_set, evaluation=results(0.6))
    has_umap = importlib.util.find_spec("umap") is not None
    report([str(hostile_run), other.uri], str(place / "report.html"), embedded=120, umap=has_umap)
    return place / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    where = chromium()
    if where is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as player:
        # Chromium's sandbox cannot be had by root, as in containers; the page is our own file.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        shown = player.chromium.launch(executable_path=where, args=arguments)
        yield shown
        shown.close()


class Watch:
    """Everything that a page does which a report must not."""

    def __init__(self, page: Any, file: Path) -> None:
        self.told: list[str] = []
        page.on("console", lambda message: self.told.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.told.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.told.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self._request(request.url, file))

    def _request(self, url: str, file: Path) -> None:
        if not url.startswith("data:") and url != file.as_uri():
            self.told.append(f"request: {url}")


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1400, "dark")])
def test_a_report_is_clicked_through(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    watch = Watch(page, page_file)
    page.goto(page_file.as_uri())
    fits = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert fits, "the page is wider than the window"

    look_at_charts(page)
    switch_runs(page)
    use_the_map(page)
    filter_the_quarantine(page)
    enlarge_a_picture(page)
    change_the_theme(page, scheme)
    for link in page.locator("nav a").all():
        link.click()
        assert page.locator(f"{link.get_attribute('href')}").is_visible()

    assert page.evaluate("window.pwned") is None
    assert watch.told == []
    page.close()


def look_at_charts(page: Any) -> None:
    """Pointing at a chart says the values there."""
    figure = page.locator("figure[data-chart]").first
    figure.locator("svg[role=img]").hover()
    words = figure.locator("output").inner_text()
    assert "images seen" in words
    assert "(at " in words
    page.locator("h1").hover()
    assert "images seen" not in figure.locator("output").inner_text()


def switch_runs(page: Any) -> None:
    """One run at a time below; the button shows the other."""
    buttons = page.locator("button[data-show-run]")
    assert buttons.count() == 2
    for number in ("1", "0"):
        page.locator(f"button[data-show-run='{number}']").click()
        assert page.locator(f"#map [data-run='{number}']").is_visible()
        assert not page.locator(f"#map [data-run='{1 - int(number)}']").is_visible()


def use_the_map(page: Any) -> None:
    """A point tells what it is and shows its picture; a class can be hidden; other components can be seen."""
    look = page.locator("#map [data-run='0'] [data-look]")
    look.locator(".map:not(.hide) circle[data-i='3']").click(force=True)
    assert look.locator(".inspect p").inner_text().startswith("image ")
    painted = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(value => value !== 0)"
    assert look.locator("canvas").evaluate(painted)
    first = look.locator("button[data-class]").first
    first.click()
    assert first.get_attribute("aria-pressed") == "false"
    assert look.locator(".map:not(.hide) circle.off").count() > 0
    first.click()
    assert look.locator(".map:not(.hide) circle.off").count() == 0
    look.locator("button[data-map='1']").click()
    assert look.locator(".map").nth(1).is_visible()
    assert not look.locator(".map").nth(0).is_visible()
    if importlib.util.find_spec("umap") is not None:
        look.locator("button[data-map]", has_text="UMAP").click()
        assert look.locator(".map").nth(2).locator("circle[data-i]").count() > 100


def filter_the_quarantine(page: Any) -> None:
    """By words and by reason."""
    block = page.locator("#input [data-run='0'] [data-quarantine]")
    rows = block.locator("tbody tr:not(.hide)")
    everything = rows.count()
    assert everything > 5
    block.locator("input").fill("ONMOUSEOVER")
    assert 0 < rows.count() < everything
    block.locator("input").fill("")
    reason = block.locator("button[data-reason]").first
    reason.click()
    assert reason.get_attribute("aria-pressed") == "true"
    assert rows.count() > 0
    reason.click()
    assert rows.count() == everything


def enlarge_a_picture(page: Any) -> None:
    page.locator("#views [data-run='0'] img.pixels").first.click()
    large = page.locator("dialog#large")
    assert large.is_visible()
    assert large.locator("img").evaluate("image => image.naturalWidth") > 0
    large.click()
    assert not large.is_visible()


def change_the_theme(page: Any, scheme: str) -> None:
    """Auto follows the system; the button goes through light and dark and back."""
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    assert page.evaluate(background) == (light if scheme == "light" else dark)
    button = page.locator("#theme")
    for expected in (light, dark, light if scheme == "light" else dark):
        button.click()
        assert page.evaluate(background) == expected


def test_it_is_all_there_without_its_script(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    for section in ("curves", "results", "health", "views", "map", "input", "attempts", "settings"):
        assert page.locator(f"#{section} h2").is_visible()
    assert page.locator("#map [data-run]").nth(0).is_visible()
    assert page.locator("#map [data-run]").nth(1).is_visible()
    context.close()
