"""What quality.py finds, as data and as tables: accuracies with spread, differences of pairs, shapes of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal, get_args

from simclr_ray.evaluate.intervals import interval95

Data = Literal["fashion-mnist", "emoji"]
Side = Literal["ours", "lightly", "lightly, one batch", "ours, units of 64", "random encoder", "raw pixels"]

PAPER_TEMPERATURE = {0.05: 59.7, 0.1: 64.4, 0.5: 60.7, 1.0: 58.0}
"""SimCLR (arXiv 2002.05709v3), table 5: top-1 of the linear probe with l2 normalisation."""
PAPER_STRENGTH = {0.125: 59.6, 0.25: 61.0, 0.5: 62.6, 1.0: 63.2}
"""Its table 1, without blur."""


@dataclass(frozen=True)
class Cell:
    """One training and its measurement."""

    data: Data
    side: Side
    seed: int
    setting: str = ""
    """Of a sweep, as an override: `loss.temperature=0.5`; empty for the recipe."""

    @property
    def name(self) -> str:
        setting = f"_{self.setting}" if self.setting else ""
        return f"{self.data}_{self.side.replace(', ', '-').replace(' ', '-')}_seed{self.seed}{setting}"


@dataclass(frozen=True)
class Result:
    """What a cell has given."""

    cell: Cell
    knn: float
    """Fraction, on the test set."""
    linear: float
    """Fraction, mean over the probe's seeds."""
    steps: int
    images_seen: int
    first_loss: float | None
    last_loss: float | None
    """Means over the first and the last tenth of the steps."""
    step_s: float
    """Of the later steps; 0 where nothing is trained."""
    train_s: float
    """With the start of processes, Ray's among them."""
    measure_s: float


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation over pretraining seeds, in percent."""
    if not values:
        return "-"
    text = f"{100 * mean(values):.1f}"
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Two-sided 95 % interval of the mean difference of pairs (of seeds), in points; None of fewer than two."""
    if len(differences) < 2:
        return None
    found = interval95(differences)
    return 100 * found.low, 100 * found.high


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, for values without ties."""
    order_a, order_b = ({i: rank for rank, i in enumerate(sorted(range(len(v)), key=v.__getitem__))} for v in (a, b))
    n = len(a)
    return 1 - 6 * sum((order_a[i] - order_b[i]) ** 2 for i in range(n)) / (n * (n * n - 1))


def show(results: Sequence[Result]) -> dict[str, Any]:
    """Print the tables and return what they say."""
    said: dict[str, Any] = {"sides": {}, "difference": {}, "sweeps": {}}
    print("\n| data | side | seeds | images seen | kNN % | linear % |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for data in ("fashion-mnist", "emoji"):
        by_side = {side: [r for r in results if r.cell.data == data and r.cell.side == side and not r.cell.setting]
                   for side in get_args(Side)}  # fmt: skip
        for side, of_it in by_side.items():
            if of_it:
                knn, linear = spread([r.knn for r in of_it]), spread([r.linear for r in of_it])
                print(f"| {data} | {side} | {len(of_it)} | {of_it[0].images_seen:,} | {knn} | {linear} |")
                said["sides"][f"{data}, {side}"] = {"knn": [r.knn for r in of_it], "linear": [r.linear for r in of_it]}
        for peer in ("lightly", "lightly, one batch", "ours, units of 64"):
            said["difference"] |= _difference(data, by_side["ours"], by_side[peer], peer)
    for what, published, data in (
        ("loss.temperature", PAPER_TEMPERATURE, "fashion-mnist"), ("views.strength", PAPER_STRENGTH, "emoji"),
    ):  # fmt: skip
        said["sweeps"] |= _sweep(what, published, [r for r in results if r.cell.data == data])
    return said


def _difference(data: str, ours: Sequence[Result], theirs: Sequence[Result], peer: str) -> dict[str, Any]:
    """Ours less the peer's, seed by seed."""
    said: dict[str, Any] = {}
    peers = {r.cell.seed: r for r in theirs}
    pairs = [(r, peers[r.cell.seed]) for r in ours if r.cell.seed in peers]
    for measure in ("knn", "linear"):
        differences = [getattr(a, measure) - getattr(b, measure) for a, b in pairs]
        if not differences:
            continue
        bounds = interval(differences)
        between = f", 95 % interval {bounds[0]:+.1f} to {bounds[1]:+.1f}" if bounds else ", one seed"
        print(f"{data}, {measure}: ours less {peer}'s {100 * mean(differences):+.1f} points{between}")
        name = f"{data}, {measure}" if peer == "lightly" else f"{data}, {measure}, {peer}"
        said[name] = {"points": [100 * one for one in differences], "interval": bounds}
    return said


def _sweep(what: str, published: dict[float, float], results: Sequence[Result]) -> dict[str, Any]:
    """One setting's values beside the paper's, both less their best."""
    found = {value: [r.linear for r in results if r.cell.setting == f"{what}={value}"] for value in published}
    found = {value: accuracies for value, accuracies in found.items() if accuracies}
    if not found:
        return {}
    best, best_published = max(100 * mean(a) for a in found.values()), max(published[value] for value in found)
    print(f"\n| {what} | linear % | less the best | the paper's, less its best |\n| ---: | ---: | ---: | ---: |")
    for value, accuracies in found.items():
        off, theirs = 100 * mean(accuracies) - best, published[value] - best_published
        print(f"| {value:g} | {spread(accuracies)} | {off:+.1f} | {theirs:+.1f} |")
    said: dict[str, Any] = {"linear": {str(value): accuracies for value, accuracies in found.items()}}
    if len(found) > 2:
        means = [mean(accuracies) for accuracies in found.values()]
        said["rank_correlation"] = rank_correlation(means, [published[value] for value in found])
        print(f"rank correlation with the paper's: {said['rank_correlation']:+.2f} of {len(found)} values")
    return {what: said}
