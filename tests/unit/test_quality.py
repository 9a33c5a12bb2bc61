"""The statistics of benchmarks/quality.py, by examples that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import benchmark


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return benchmark("quality")


@pytest.fixture(scope="module")
def quality_tables() -> ModuleType:
    return benchmark("quality_tables")


def test_an_interval_of_three_pairs(quality_tables: ModuleType) -> None:
    """Differences 0.01, 0.02, 0.03: mean 0.02, standard deviation 0.01, t(2) = 4.303, so 0.02 +- 0.02484."""
    low, high = quality_tables.interval([0.01, 0.02, 0.03])
    assert (low, high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert quality_tables.interval([0.01]) is None


def test_rank_correlation(quality_tables: ModuleType) -> None:
    assert quality_tables.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert quality_tables.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert quality_tables.rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


def test_a_mean_has_its_spread_where_there_is_one(quality_tables: ModuleType) -> None:
    assert quality_tables.spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert quality_tables.spread([0.5]) == "50.0"
    assert quality_tables.spread([]) == "-"


def test_every_seed_of_a_side_meets_the_same_of_the_other(quality: ModuleType) -> None:
    cells = quality.cells(3, 2, emoji=True)
    assert len({cell.name for cell in cells}) == len(cells)
    for data in ("fashion-mnist", "emoji"):
        sides = [
            {cell.seed for cell in cells if (cell.data, cell.side, cell.setting) == (data, side, "")}
            for side in quality.TRAINED
        ]
        assert sides == [{0, 1, 2}] * 2
    assert not any(cell.data == "emoji" for cell in quality.cells(3, 2, emoji=False))


def test_both_sides_get_the_same_recipe(quality: ModuleType, tmp_path: Path) -> None:
    from simclr_ray.configure import load_config

    places = quality.Places(tmp_path, tmp_path / "emoji", None)
    for data in ("fashion-mnist", "emoji"):
        ours, theirs = (places.overrides(quality.Cell(data, side, 1)) for side in quality.TRAINED)
        assert ours == theirs
        config = load_config(str(quality.RECIPE), ours)
        assert config.run.seed == 1
        assert config.views.size == (28 if data == "fashion-mnist" else 40)
    swept = quality.Cell("fashion-mnist", "ours", 0, "loss.temperature=0.5")
    assert load_config(str(quality.RECIPE), places.overrides(swept)).loss.temperature == 0.5
