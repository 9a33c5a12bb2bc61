"""Claim: exact NT-Xent, faster and smaller than any other exact one.

Five parts, each printed as tables and written to benchmarks/results/loss.json; parts that are not run keep what the
file says of them:

exact   value and parameter gradients on 1 to 4 gloo ranks against the reference; the gradient late in training
one     time and memory of forward and backward on one process with two threads, beside other implementations
two     the same on two gloo ranks with one thread each
memory  memory alone, as the batch doubles
micro   one training step of a ResNet, whole and in gradient-cached micro-batches

    python benchmarks/loss.py [--part exact one two memory micro] [--quick]

Time and memory, how: every implementation at every size has fresh processes. Its libraries are loaded by a tiny call,
then the growth of the resident set in one full-size step is its memory, then all implementations take turns, and the
median over all turns is its time. A time is the slowest rank's, memory the largest rank's. Peers take part where they
are installed (lightly, solo-learn, pytorch-metric-learning); what would take more than --most-gib is not run, and the
tables say so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from loss_exact import exact, show_exact
from loss_micro import micro, show_micro
from loss_peers import MATMULS, ONE_PROCESS, RANKS, Implementation, NotRun, installed_peers
from loss_processes import Measured, Task, Team, available_bytes
from machine import write_part

FILE = Path(__file__).parent / "results" / "loss.json"
DIM, TEMPERATURE = 128, 0.5
SIZES = (256, 1024, 4096, 8192, 16384, 32768)
"""2B over all ranks. 256 because it is the only one that the cubic peer can take."""
MEMORY_SIZES = (8192, 16384, 32768, 65536)
TURN_S = 0.25
"""A turn repeats a step until this long has passed, so that small sizes get more repeats."""
LOSS_TILE = 512
"""Rows and columns of a tile of the loss on a CPU."""


def timings(implementations: Mapping[str, Implementation], ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    sizes = (256, 512) if args.quick else SIZES
    rounds = 2 if args.quick else args.rounds
    measured: dict[str, dict[int, Measured]] = {}  # what larger sizes are predicted from
    results = {}
    for rows in sizes:
        results[str(rows)] = at_size(implementations, rows, ranks, rounds, args, measured)
        show_size(rows, results[str(rows)])
    return {
        "dim": DIM, "temperature": TEMPERATURE, "ranks": ranks, "threads_per_rank": 2 // ranks, "rounds": rounds,
        "most_gib": args.most_gib, "peers": installed_peers(), "sizes": results,
    }  # fmt: skip


def at_size(
    implementations: Mapping[str, Implementation], rows: int, ranks: int, rounds: int, args: argparse.Namespace,
    measured: dict[str, dict[int, Measured]],
) -> dict[str, Any]:  # fmt: skip
    """Everything about one size, by implementation: figures, or why it was not run."""
    most = min(args.most_gib * 2**30, available_bytes() - (1 << 30))
    teams: dict[str, Team] = {}
    result: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    try:
        for name in [*implementations, *MATMULS]:
            kind = implementations[name].kind if name in implementations else "matmuls"
            result[name] = {"kind": kind}
            try:
                refuse_what_does_not_fit(implementations.get(name), rows, ranks, most, measured.get(name, {}))
                teams[name] = Team(Task(name, rows, DIM, TEMPERATURE, ranks, 2 // ranks, most // ranks))
                first = teams[name].first_step()
            except NotRun as reason:
                result[name]["not_run"] = str(reason)
                teams.pop(name, None)
                continue
            measured.setdefault(name, {})[rows] = first
            seconds[name] = []
            result[name] |= {"peak_bytes": first.peak_bytes}
            if kind != "matmuls":
                result[name]["loss"] = first.loss
        repeats = {name: turn_repeats(team, measured[name][rows].seconds) for name, team in teams.items()}
        order = list(teams)
        for _ in range(rounds):
            for name in order:
                seconds[name] += teams[name].step_seconds(repeats[name])
            order.append(order.pop(0))  # nobody always follows the same neighbour
    finally:
        for team in teams.values():
            team.close()
    for name, times in seconds.items():
        result[name] |= {"ms": 1e3 * median(times), "least_ms": 1e3 * min(times), "steps": len(times)}
    return {"best_peer": add_ratios(result), "implementations": result}


def refuse_what_does_not_fit(
    implementation: Implementation | None, rows: int, ranks: int, most: int, smaller: Mapping[int, Measured]
) -> None:
    """Raise NotRun if this size is expected to need more than `most` bytes on all ranks together."""
    if implementation is None or implementation.kind == "ours":
        return
    if implementation.most_rows is not None and rows > implementation.most_rows:
        raise NotRun(implementation.reason)
    if smaller:
        known = max(smaller)
        expected = ranks * smaller[known].peak_bytes * (rows / known) ** implementation.power
        if expected > most:
            raise NotRun(
                f"does not fit: {expected / 2**30:.1f} GiB expected from {known} rows, {most / 2**30:.1f} GiB allowed"
            )


def turn_repeats(team: Team, first_seconds: float) -> int:
    """Also a second step for all: the first one paged its memory in."""
    (second,) = team.step_seconds(1)
    return max(1, min(50, math.ceil(TURN_S / min(first_seconds, second))))


def add_ratios(result: dict[str, Any]) -> dict[str, str | None]:
    """Of each to the best peer and to the matmuls. Best in time and best in memory, returned, may be two peers."""
    ran = {name: entry for name, entry in result.items() if "ms" in entry}
    peers = [name for name, entry in ran.items() if entry["kind"] == "peer"]
    fastest = min(peers, key=lambda name: ran[name]["ms"], default=None)
    smallest = min(peers, key=lambda name: ran[name]["peak_bytes"], default=None)
    for entry in ran.values():
        ratios = {}
        if fastest is not None and smallest is not None:
            ratios["time_to_best_peer"] = entry["ms"] / ran[fastest]["ms"]
            if entry["kind"] != "matmuls":
                ratios["memory_to_best_peer"] = entry["peak_bytes"] / ran[smallest]["peak_bytes"]
        for matmuls in MATMULS:
            ratios[f"time_to_{matmuls.replace(' ', '_')}"] = entry["ms"] / ran[matmuls]["ms"]
        entry["ratios"] = ratios
    return {"time": fastest, "memory": smallest}


def show_size(rows: int, result: dict[str, Any]) -> None:
    best = result["best_peer"]
    print(
        f"\n2B = {rows}, D = {DIM}; best peer: {best['time'] or 'none'} in time, {best['memory'] or 'none'} in memory"
    )
    heads = ("ms", "least", "/ best peer", "/ symmetric", "/ bare mm", "peak MB", "/ best peer")
    print(f"  {'':<24}" + "".join(f"{head:>13}" for head in heads))
    for name, entry in result["implementations"].items():
        if "not_run" in entry:
            print(f"  {name:<24}{'not run: ' + entry['not_run']}")
            continue
        ratios = entry["ratios"]
        cells = [f"{entry['ms']:.1f}", f"{entry['least_ms']:.1f}"]
        for key in ("time_to_best_peer", "time_to_symmetric_matmuls", "time_to_bare_matmuls"):
            cells.append(f"{ratios[key]:.3f}" if key in ratios else "-")
        cells.append(f"{entry['peak_bytes'] / 1e6:.1f}" if entry["kind"] != "matmuls" else "-")
        cells.append(f"{ratios['memory_to_best_peer']:.4f}" if "memory_to_best_peer" in ratios else "-")
        print(f"  {name:<24}" + "".join(f"{cell:>13}" for cell in cells))
    losses = {name: entry["loss"] for name, entry in result["implementations"].items() if "loss" in entry}
    for name, loss in losses.items():
        if abs(loss / losses[next(iter(losses))] - 1) > 1e-5:
            print(f"  NOT THE SAME LOSS: {name} has {loss!r}")


def memory(args: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for rows in (1024, 2048) if args.quick else MEMORY_SIZES:
        team = Team(Task("ours", rows, DIM, TEMPERATURE, 1, 2, args.most_gib << 30))
        try:
            results[str(rows)] = {"peak_bytes": team.first_step().peak_bytes, "expected_bytes": expected_bytes(rows)}
        finally:
            team.close()
    return {"dim": DIM, "temperature": TEMPERATURE, "tile": LOSS_TILE, "sizes": results}


def expected_bytes(rows: int) -> int:
    """One process, float32: unit rows and their gradient, each (2B, D), and three tiles.

    Sums and statistics, some 200 bytes a row in float64, are left out. No term is quadratic in the batch.
    """
    return 2 * rows * DIM * 4 + 3 * min(rows // 2, LOSS_TILE) ** 2 * 4


def show_memory(result: dict[str, Any]) -> None:
    print(f"\nmemory of ours, one process, D = {DIM}; formula: 2 x (2B, D) + 3 tiles of {LOSS_TILE}^2, float32")
    print(f"  {'2B':>8}{'peak MB':>10}{'bytes / row':>13}{'formula MB':>12}{'/ formula':>11}{'/ half the rows':>17}")
    before = None
    for rows, entry in result["sizes"].items():
        peak, expected = entry["peak_bytes"], entry["expected_bytes"]
        growth = "-" if before is None else f"{peak / before:.2f}"
        print(
            f"  {rows:>8}{peak / 1e6:>10.1f}{peak / int(rows):>13.0f}{expected / 1e6:>12.1f}"
            f"{peak / expected:>11.2f}{growth:>17}"
        )
        before = peak


def run_exact(args: argparse.Namespace) -> dict[str, Any]:
    result = exact(args.quick)
    show_exact(result)
    return {"peers": installed_peers(), **result}


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    print("\none process, two threads: forward and backward")
    return timings(ONE_PROCESS, 1, args)


def run_two(args: argparse.Namespace) -> dict[str, Any]:
    print("\ntwo gloo ranks, one thread each: forward and backward; 2B over both, memory of one rank")
    return timings(RANKS, 2, args)


def run_memory(args: argparse.Namespace) -> dict[str, Any]:
    result = memory(args)
    show_memory(result)
    return result


def run_micro(args: argparse.Namespace) -> dict[str, Any]:
    result = micro(256 if args.quick else 4096)
    show_micro(result)
    return result


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "exact": run_exact,
    "one": run_one,
    "two": run_two,
    "memory": run_memory,
    "micro": run_micro,
}
"""Each prints its tables and returns what the file keeps under its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7, help="turns of every implementation at every size")
    parser.add_argument("--most-gib", type=int, default=12, help="what one step may take on all ranks together")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds: does it work; see --output")
    parser.add_argument("--output", type=Path, help=f"default {FILE.name} beside this; with --quick, none")
    args = parser.parse_args()
    output = args.output or (None if args.quick else FILE)
    for part in args.part:
        result = PARTS[part](args)
        if output is not None:
            write_part(part, result, output, PARTS)


if __name__ == "__main__":
    main()
