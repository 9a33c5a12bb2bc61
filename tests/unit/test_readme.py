"""README's numbers of the views are those that the benchmark measured last."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tests.conftest import benchmark

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "views.json").read_text())
CASES: dict[str, dict[str, Any]] = MEASURED["speed"]["cases"]
OURS = ("ours", "ours, by OpenCV", "ours, by torch")
OTHERS = ("AlbumentationsX", "lightly", "torchvision v1, Pillow's blur")
LIMIT = "decode alone"


def heads() -> dict[str, str]:
    return {name: f"| {name} -> {case['view']} |" for name, case in CASES.items()}


def speed_rows() -> list[str]:
    """Images a second, a row a case."""
    rows = []
    for name, head in heads().items():
        pipelines = CASES[name]["pipelines"]
        cells = [f"{pipelines[one]['images_a_second']:,.0f}" for one in (*OURS, *OTHERS, LIMIT)]
        rows.append(" ".join([head, *(f"{cell} |" for cell in cells)]))
    return rows


def ratio_rows() -> list[str]:
    """Of our makers of views to the best peer, and of the kernel to the decoder."""
    rows = []
    for name, head in heads().items():
        ratios = {one: CASES[name]["pipelines"][one]["ratios"] for one in OURS}
        cells = [f"{ratios[one]['speed_to_best_peer']:.2f}" for one in OURS]
        cells.append(f"{ratios['ours']['share_of_decode_limit']:.0%}")
        rows.append(" ".join([head, *(f"{cell} |" for cell in cells)]))
    return rows


def test_the_tables_of_the_views_are_the_measured_ones() -> None:
    for rows in (speed_rows(), ratio_rows()):
        table = "\n".join(rows)
        assert table + "\n\n" in README, f"README.md should have:\n{table}"


def test_what_is_said_beside_the_tables_was_measured() -> None:
    assert "which is AlbumentationsX each time" in README
    assert {case["best_peer"] for case in CASES.values()} == {"AlbumentationsX"}
    photographs = [case["pipelines"] for case in CASES.values() if case["view"] == 224]
    slower = [1 / one["ours, by torch"]["ratios"]["speed_to_best_peer"] for one in photographs]
    assert f"photographs take {min(slower):.1f} to {max(slower):.1f} times as long as by AlbumentationsX" in README
    whole = MEASURED["fidelity"]["differences"]["whole view, 500 x 375"]
    ours, theirs = whole["ours"]["mean"], whole["torchvision, Pillow"]["mean"]
    assert f"our views are off by {ours:.2f} levels of 255 on average, torchvision's by {theirs:.1f}." in README


def test_the_stream_and_training_are_as_measured() -> None:
    ingest, train = (json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("ingest", "train"))
    text = " ".join(README.split())
    photos, small = ingest["photos"], ingest["small"]
    stream, plain = (rate(photos[side]) for side in ("stream", "plain"))
    shares = [part["stream_to_plain"]["per_cpu_s"] for part in (photos, small)]
    ours = sum(photos["cost_us"]["Ray's share"].values()) / 1000
    still = sum(photos["cost_us"]["idle"].values()) / 1000
    for words in (
        f"at {stream:.0f} images a second where a plain loop of the same functions makes {plain:.0f} on one core "
        f"({stream / plain:.0%})".replace("%", " %"),
        f"and {shares[0]:.0%} of its images for each second of CPU".replace("%", " %"),
        f"costs {sum(photos['cost_us']['plain loop'].values()) / 1000:.2f} ms in the loop and {ours:.2f} ms of Ray's",
        f"of which {still:.2f} ms is what Ray's processes take standing still ({photos['idle_cores']:.2f} cores",
        f"(Fashion-MNIST: {shares[1]:.0%})".replace("%", " %"),
    ):
        assert words in text, words
    speeds, ratios = list(train["images_per_s"].values()), list(train["ratio"].values())
    for words in (
        f"{speeds[0]:.0f} images a second to {speeds[1]:.0f}, {ratios[0]:.2f} times, and {ratios[1]:.2f} times",
        f"Ours waits for data {100 * train['wait_fraction']:.1f} % of the time.",
    ):
        assert words in text, words


def test_the_stream_keeps_within_the_object_store_as_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/ingest.json").read_text())["pressure"]
    minutes = int(measured["minutes"])
    words = f"With an object store of {measured['store_mib']} MiB and a trainer that takes half of what the stream"
    assert f"{words} could make, {minutes} minutes pass without a spilled object" in " ".join(README.split())
    assert measured["series"]["spilled_mib"]["most"] == 0


def test_reading_from_a_store_is_as_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/store.json").read_text())
    for name, one in measured["read"].items():
        share = f" {one['of_local']:.0%} ".replace("%", " %") if name != "local disk" else " "
        cells = f"{share}| {one['requests_an_image']:.3f} | {one['first_unit_s']:.2f} s |"
        row = f"| {name.replace('answers', 'every answer')} | {one['images_per_s']:.0f} |{cells}"
        assert row in README, row
    names = ("canonical shards", "WebDataset tars", "Parquet, row groups of 100", "an object an image")
    for name, one in zip(names, measured["layouts"].values(), strict=True):
        row = f"| {name} | {one['requests_an_image']:.3f} | {one['read_per_stored']:.2f} |"
        assert row in README, row


def test_the_search_is_as_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/search.json").read_text())
    cells = {tuple(one["settings"].values()): one for one in measured["again"] if one["settings"]}
    for temperature in {temperature for temperature, _ in cells}:
        both = (cells[temperature, strength] for strength in (0.5, 0.0))
        row = " | ".join(f"{100 * one['mean']:.1f} ± {100 * one['spread']:.1f}" for one in both)
        assert f"| {temperature:g} | {row} |" in README, row
    spearman, text = measured["spearman"]["knn_top1"], " ".join(README.split())
    for words in (
        f"RankMe ranked the eight trials much like kNN (Spearman {spearman['rankme']:+.2f}; alignment + uniformity "
        f"{spearman['alignment_uniformity']:+.2f}, LiDAR {spearman['lidar']:+.2f})",
        f"A trial takes {measured['more_a_trial_s']:.0f} s more than the same training as a command",
        f"the command kept all {measured['killed']['of_them_as_they_were']} trainings that were done",
    ):
        assert words in text, words
    assert measured["killed"]["of_them_as_they_were"] == measured["killed"]["finished_before"]


def test_embed_is_as_fast_as_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/embed.json").read_text())["small 28"]
    speed, of_the_loop = (measured[table]["an actor at work"] for table in ("images_a_second", "of_the_bare_loop"))
    text = " ".join(README.split())
    words = f"({of_the_loop['clock']:.2f} of it, the median of paired rounds; {speed['clock']:,.0f} images/s with the"
    assert words in text, words
    started = measured["of_the_bare_loop"]["embed, one actor, with its start"]["clock"]
    assert f"16,384 images take {1 / started:.1f} times as long" in text
    assert of_the_loop["clock"] > 0.9


def test_quality_beside_lightly_is_as_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/quality.json").read_text())
    text = " ".join(README.split())

    def told(side: str, measure: str) -> str:
        values = measured["sides"][side][measure]
        assert len(values) >= 3
        return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"

    for data, name in (("fashion-mnist", "Fashion-MNIST"), ("emoji", "emoji")):
        seen = {one["images_seen"] for one in measured["cells"] if one["cell"]["data"] == data} - {0}
        assert len(seen) == 1, "both sides have seen as many"
        cells = [told(f"{data}, {side}", measure) for measure in ("knn", "linear") for side in ("ours", "lightly")]
        pixels = measured["sides"][f"{data}, raw pixels"]
        cells.append(f"{100 * pixels['knn'][0]:.1f}, {100 * pixels['linear'][0]:.1f}")
        row = f"| {name}, {seen.pop():,} images seen | {' | '.join(cells)} |"
        assert row in README, row
    pairs = {}
    for key, one in measured["difference"].items():
        low, high = one["interval"]
        pairs[key] = f"{mean(one['points']):+.1f} ({low:+.1f} to {high:+.1f})"
    for measure, word in (("knn", "kNN"), ("linear", "linear")):
        words = f"{word} {pairs[f'fashion-mnist, {measure}']} and {pairs[f'emoji, {measure}']}"
        assert words in text, words
    for side in ("emoji, lightly, one batch", "emoji, ours, units of 64"):
        words = f"has {told(side, 'knn')} and {told(side, 'linear')}"
        assert words in text, words


def test_sweeps_beside_the_papers_are_as_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["sweeps"]
    tables = benchmark("quality_tables")
    for setting, name in (("loss.temperature", "temperature"), ("views.strength", "jitter strength")):
        found = {value: 100 * mean(values) for value, values in measured[setting]["linear"].items()}
        paper = {"loss.temperature": tables.PAPER_TEMPERATURE, "views.strength": tables.PAPER_STRENGTH}[setting]
        assert list(found) == [str(value) for value in paper]
        off = [one - max(found.values()) for one in found.values()]
        theirs = [one - max(paper.values()) for one in paper.values()]
        assert f"| {name} | {' | '.join(f'{value:g}' for value in paper)} |" in README
        data = {"loss.temperature": "Fashion-MNIST", "views.strength": "emoji"}[setting]
        assert f"| ours, {data} | {' | '.join(f'{one:+.1f}' for one in off)} |" in README
        assert f"| the paper's | {' | '.join(f'{one:+.1f}' for one in theirs)} |" in README
        if setting == "loss.temperature":  # what README says of them
            assert found["1.0"] == min(found.values())
            assert max(found.values()) - min(found[value] for value in ("0.05", "0.1", "0.5")) < 0.5
    cells = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["cells"]
    knn = {one["cell"]["setting"]: one["knn"] for one in cells if one["cell"]["setting"].startswith("views.strength")}
    best = max(knn, key=lambda setting: knn[setting])
    assert best == "views.strength=1.0"
    assert f"kNN is best at 1, with {100 * knn[best]:.1f}" in " ".join(README.split())


def rate(runs: list[dict[str, float]]) -> float:
    """Images a second over several runs."""
    return sum(run["images"] for run in runs) / sum(run["wall_s"] for run in runs)
