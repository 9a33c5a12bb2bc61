import importlib.util
import math
import sys

import numpy as np
import pytest
from PIL import Image

from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate import pictures
from simclr_ray.evaluate.linear import ProbeSummary
from simclr_ray.evaluate.pictures import comparison_bars, curves, neighbour_sheet, views_sheet
from simclr_ray.evaluate.table import EvaluationRow
from simclr_ray.observe.metrics import Record

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the pictures extra")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def size(path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        picture.load()
        return picture.size


@needs_matplotlib
def test_a_views_sheet_takes_gray_and_colour_of_any_size(tmp_path):
    images = [noise(28, 28), noise(40, 20, 1), noise(150, 200, 3)]
    path = tmp_path / "new" / "views.png"
    views_sheet(images, noise(3, 2, 8, 8, 3), path)
    assert size(path)[0] > 400


@needs_matplotlib
def test_pixels_of_small_images_are_not_blurred(tmp_path):
    checks = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    views_sheet([checks], np.stack([checks, checks])[None], tmp_path / "views.png", title="")
    with Image.open(tmp_path / "views.png") as picture:
        gray = np.asarray(picture.convert("L"))
    cell, dpi = pictures._CELL, pictures._DPI
    top, left = (int((pictures._MARGIN + extra) * dpi) + 4 for extra in (pictures._HEAD, 0))
    inside = gray[top : top + int(cell * dpi) - 8, left : left + int(cell * dpi) - 8]
    assert np.isin(inside, (0, 255)).mean() > 0.95


@needs_matplotlib
def test_names_are_never_read_as_mathematics(tmp_path):
    neighbour_sheet(
        [noise(8, 8)],
        [[noise(8, 8), noise(8, 8)]],
        tmp_path / "n.png",
        query_labels=[0],
        neighbour_labels=[[0, 5]],
        class_names=["$\\bad{^ \x1b"],
        similarity=[[0.9, 0.8]],
        title="$_^$",
    )
    plain = tmp_path / "plain.png"
    neighbour_sheet([noise(8, 8)], [[noise(8, 8), noise(8, 8)]], plain)
    assert size(plain)[1] < size(tmp_path / "n.png")[1], "no room is kept for words that are not there"


@needs_matplotlib
@pytest.mark.parametrize("count", [1, 150])
def test_curves_bear_gaps_nan_and_a_resume(tmp_path, count):
    records = [
        Record(k, 256 * k, attempt=1 + (k > 80), wall_s=0.0, values={"train/loss": math.nan if k == 9 else 5 / (k + 1)})
        for k in range(count)
    ]
    records.append(Record(count, 256 * count, 2, 0.0, {"eval/knn_top1": 0.5, "data/wait_fraction": 0.1}))
    curves(records, tmp_path / "curves.png", title="run $x^")
    assert size(tmp_path / "curves.png") == (1430, 910)


@needs_matplotlib
def test_bars_bear_what_is_missing(tmp_path):
    rows = [
        EvaluationRow("raw pixels", knn_top1=0.8),
        EvaluationRow("random encoder"),
        EvaluationRow("trained encoder", linear={"all labels": ProbeSummary(0.9, 0.01, ())}),
    ]
    comparison_bars(rows, tmp_path / "bars.png")
    assert size(tmp_path / "bars.png")[0] > 600
    with pytest.raises(DataError, match="accuracy"):
        comparison_bars([EvaluationRow("nothing")], tmp_path / "none.png")


def test_a_running_mean_is_the_mean_of_what_is_near():
    values = np.array([1.0, 2, math.nan, 4, 5])
    assert pictures._running_mean(values, 1).tolist() == [1.5, 1.5, 3.0, 4.5, 4.5]
    assert math.isnan(pictures._running_mean(np.array([math.nan]), 3)[0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: views_sheet([], noise(0, 2, 8, 8, 3), path),
        lambda path: views_sheet([noise(8, 8)], noise(2, 2, 8, 8, 3), path),
        lambda path: neighbour_sheet([], [], path),
        lambda path: neighbour_sheet([noise(8, 8)], [[]], path),
        lambda path: neighbour_sheet([noise(8, 8)], [[noise(8, 8)]], path, similarity=[[0.1, 0.2]]),
        lambda path: neighbour_sheet([noise(8, 8)], [[noise(8, 8)]], path, query_labels=[1, 2]),
        lambda path: curves([], path),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, draw):
    with pytest.raises(DataError):
        draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@needs_matplotlib
def test_what_is_not_an_image_is_refused(tmp_path):
    with pytest.raises(DataError, match="float64"):
        views_sheet([np.zeros((8, 8))], noise(1, 2, 8, 8, 3), tmp_path / "x.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"simclr-ray\[pictures\]"):
        views_sheet([noise(8, 8)], noise(1, 2, 8, 8, 3), tmp_path / "x.png")
