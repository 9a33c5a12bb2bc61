"""Numbers over several seeds, with the interval that they leave their mean in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

#: Student's t at 97.5 % for 1 to 30 degrees of freedom (any table of it); beyond, the normal's 1.96 is near enough.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean and where it lies with 95 % confidence, if the seeds' values are normal."""

    mean: float
    low: float
    """NaN for one value."""
    high: float


def interval95(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval (Student's t) of at least one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    quantile = _T[len(values) - 2] if len(values) - 1 <= len(_T) else 1.96
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def percent(values: Sequence[float]) -> str:
    """Accuracies as mean and interval in percent, `84.9 [84.2, 85.6]`; the mean alone of one, `-` of none."""
    if not values:
        return "-"
    mean, low, high = (100 * one for one in interval95(values))
    # An interval of two values may be wider than what an accuracy can be.
    return f"{mean:.1f}" if math.isnan(low) else f"{mean:.1f} [{max(0.0, low):.1f}, {min(100.0, high):.1f}]"
