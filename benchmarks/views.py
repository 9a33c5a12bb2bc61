"""Claim: a core turns encoded images into view pairs faster than other SimCLR pipelines, and more exactly.

Three parts, each printed as tables and written to benchmarks/results/views.json; parts that are not run keep what the
file says of them:

speed     images a second a core, from bytes to two finished views, beside other pipelines and the decoder alone
stages    where our time goes: header, draws, decode, crop, colours, blur
fidelity  distance of views from torchvision in float64 with the same parameters, beside Pillow's and tensors'

    python benchmarks/views.py [--part speed stages fidelity] [--photos FOLDER] [--quick]

Time, how: one thread. All pipelines take turns, in an order that rotates; a turn is whole passes over the images of a
case, each with draws of its own. A time is the processor's, of the process, by the image, and the median over turns;
`wall` is the clock's. Machines differ and so do photographs: compare ratios. Peers take part where they are installed
(AlbumentationsX or albumentations with OpenCV, lightly); the tables say who is missing.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import write_part
from views_fidelity import fidelity, show_fidelity
from views_photos import CASES, Case, Photos, encoded_crops, find_photos
from views_pipelines import LIMIT, MAKERS, PIPELINES, Encoded, NotRun, Pass, by, installed, need, staged

from simclr_ray.data.decode import Header, Limits, Rejected, decode_reduced, read_header
from simclr_ray.views.draw import Draws
from simclr_ray.views.policy import Policy, preset
from simclr_ray.views.stage import draws_at, wanted_reductions

FILE = Path(__file__).parent / "results" / "views.json"
TURN_S = 0.25
"""A turn repeats its pass until this long has passed, so that fast pipelines get more draws."""
DRAWS = 1 << 16
"""Numbers of passes from one round to the next: what is ours has the same draws in the same round."""
STAGE_MEMORY = 2 << 20
"""Bytes that `ViewStage` decodes into before it makes views of them, or the largest image if that is more."""


class Turn(NamedTuple):
    """Seconds by the image."""

    cpu: float
    wall: float


def take_turns(passes: Mapping[str, Pass], images: int, args: argparse.Namespace) -> dict[str, list[Turn]]:
    """Seconds of each pass, one a round; what a pass does first of all is not counted."""
    rounds, turn_s = (2, 0.0) if args.quick else (args.rounds, TURN_S)
    repeats = {}
    for name, one_pass in passes.items():
        one_pass(0)  # loads libraries, fills caches
        repeats[name] = max(1, math.ceil(turn_s / (images * timed(one_pass, images, 1, 1).cpu)))
    turns: dict[str, list[Turn]] = {name: [] for name in passes}
    order = list(passes)
    for number in range(1, rounds + 1):
        for name in order:
            turns[name].append(timed(passes[name], images, repeats[name], DRAWS * number))
        order.append(order.pop(0))  # nobody always follows the same neighbour
    return turns


def timed(one_pass: Pass, images: int, repeats: int, number: int) -> Turn:
    gc.collect()  # the garbage of the one before
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(repeats):
        one_pass(number + i)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Turn(cpu / (repeats * images), wall / (repeats * images))


def speed(photos: Photos, args: argparse.Namespace) -> dict[str, Any]:
    print("\nfrom encoded bytes to two finished views an image, one thread")
    results = {}
    for case in CASES:
        results[case.name] = speed_of(case, photos, args)
        show_speed(case.name, results[case.name])
    return {"packages": installed(), "photos": facts(photos), "rounds": args.rounds, "cases": results}


def speed_of(case: Case, photos: Photos, args: argparse.Namespace) -> dict[str, Any]:
    encoded = encoded_crops(photos, case, 4 if args.quick else case.images)
    policy = policy_of(case)
    passes: dict[str, Pass] = {}
    result: dict[str, dict[str, Any]] = {}
    for name, pipeline in PIPELINES.items():
        result[name] = {"kind": pipeline.kind}
        try:
            passes[name] = pipeline.make(encoded, policy)
        except NotRun as reason:
            result[name]["not_run"] = str(reason)
    for name, turns in take_turns(passes, len(encoded), args).items():
        cpu = median(turn.cpu for turn in turns)
        least, most = min(turn.cpu for turn in turns), max(turn.cpu for turn in turns)
        result[name] |= {
            "cpu_ms": 1e3 * cpu, "least_cpu_ms": 1e3 * least, "most_cpu_ms": 1e3 * most,
            "wall_ms": 1e3 * median(turn.wall for turn in turns), "images_a_second": 1 / cpu,
        }  # fmt: skip
    return {**encoded_facts(encoded), "view": case.size, "best_peer": add_ratios(result), "pipelines": result}


def add_ratios(result: dict[str, dict[str, Any]]) -> str | None:
    """Of each one's speed to the best peer's and to the decoder's. Returns the best peer."""
    ran = {name: entry for name, entry in result.items() if "cpu_ms" in entry}
    peers = [name for name, entry in ran.items() if entry["kind"] == "peer"]
    best = min(peers, key=lambda name: ran[name]["cpu_ms"], default=None)
    for entry in ran.values():
        entry["ratios"] = {"share_of_decode_limit": ran[LIMIT]["cpu_ms"] / entry["cpu_ms"]}
        if best is not None:
            entry["ratios"]["speed_to_best_peer"] = ran[best]["cpu_ms"] / entry["cpu_ms"]
    return best


def show_speed(case: str, result: dict[str, Any]) -> None:
    print(f"\n{case}, {result['kilobytes']:.1f} kB each, views of {result['view']}; best peer: {result['best_peer']}")
    heads = ("images / s", "cpu ms", "least", "most", "wall ms", "x best peer", "of limit")
    print(f"  {'':<30}" + "".join(f"{head:>12}" for head in heads))
    for name, entry in result["pipelines"].items():
        if "not_run" in entry:
            print(f"  {name:<30}  not run: {entry['not_run']}")
            continue
        times = [f"{entry[key]:.3f}" for key in ("cpu_ms", "least_cpu_ms", "most_cpu_ms", "wall_ms")]
        ratio = entry["ratios"].get("speed_to_best_peer")
        cells = [f"{entry['images_a_second']:.0f}", *times, "-" if ratio is None else f"{ratio:.2f}"]
        cells.append(f"{entry['ratios']['share_of_decode_limit']:.0%}")
        print(f"  {name:<30}" + "".join(f"{cell:>12}" for cell in cells))


def stages(photos: Photos, args: argparse.Namespace) -> dict[str, Any]:
    results = {case.name: stages_of(case, photos, args) for case in CASES}
    return {"photos": facts(photos), "rounds": args.rounds, "cases": results}


def stages_of(case: Case, photos: Photos, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds by the image. What cannot be timed alone is the difference of two stages with and without it."""
    encoded = encoded_crops(photos, case, 4 if args.quick else case.images)
    policy = policy_of(case)
    passes = alone(encoded, policy)
    unblurred = policy.model_copy(update={"blur_probability": 0.0})
    makers = []
    for maker in MAKERS:
        try:
            need(maker)
        except NotRun as reason:
            print(f"  not by {maker}: {reason}")
            continue
        makers.append(maker)
        passes[f"{maker}: cropped"] = by(maker, staged(encoded, policy, "gpu"))
        passes[f"{maker}: unblurred"] = by(maker, staged(encoded, unblurred, "cpu"))
        passes[f"{maker}: all"] = by(maker, staged(encoded, policy, "cpu"))
    turns = take_turns(passes, len(encoded), args)

    def microseconds(*signed: tuple[int, str]) -> float:
        rows = zip(*([sign * turn.cpu for turn in turns[name]] for sign, name in signed), strict=True)
        return 1e6 * median(map(sum, rows))  # of the rounds' differences, as moments differ more

    parts = {
        "header": [(1, "header")], "draw": [(1, "draw")],
        "decode": [(1, "draw and decode"), (-1, "draw")], "copy": [(1, "copy")],
    }  # fmt: skip
    result: dict[str, Any] = {}
    for maker in makers:
        cropped, unblurred_all, everything = (f"{maker}: {what}" for what in ("cropped", "unblurred", "all"))
        result[maker] = {
            **{part: microseconds(*signed) for part, signed in parts.items()},
            "crop and resize": microseconds(
                (1, cropped), *((-1, part) for part in ("header", "draw and decode", "copy"))
            ),
            "colours": microseconds((1, unblurred_all), (-1, cropped)),
            "blur": microseconds((1, everything), (-1, unblurred_all)),
            "all": microseconds((1, everything)),
        }
    return {**encoded_facts(encoded), "view": case.size, "makers": result}


def alone(encoded: Encoded, policy: Policy) -> dict[str, Pass]:
    """The stages that can be timed alone, as `ViewStage` calls them."""
    limits = Limits()
    headers: list[Header] = []
    for data in encoded:
        header = read_header(data, limits)
        assert not isinstance(header, Rejected), header
        headers.append(header)
    sizes = np.array([(header.height, header.width) for header in headers])
    ids, zeros = np.arange(len(encoded)), np.zeros(len(encoded), np.int64)
    memory = np.empty(max(STAGE_MEMORY, 3 * int(sizes.prod(axis=1).max())), dtype=np.uint8)
    at_once = max(1, STAGE_MEMORY // (3 * int(sizes.prod(axis=1).max())))
    group = np.zeros((at_once, 2, policy.size, policy.size, 3), dtype=np.uint8)

    def read(number: int) -> None:
        for data in encoded:
            read_header(data, limits)

    def draw(number: int) -> Draws:
        return draws_at(policy, seed=0, epoch=zeros + number, sample_ids=ids, sizes=sizes, use=zeros)

    def draw_and_decode(number: int) -> None:
        """At the scales that these crops allow."""
        scales = wanted_reductions(draw(number), policy)
        for data, header, scale in zip(encoded, headers, scales, strict=True):
            decode_reduced(data, header, limits, reduction=scale, buffer=memory)

    def copy(number: int) -> None:
        """Into new memory, as a unit's views have to be side by side."""
        views = np.empty((len(encoded), *group.shape[1:]), dtype=np.uint8)
        for start in range(0, len(views), at_once):
            rows = ids[start : start + at_once]
            views[rows] = group[: len(rows)]

    return {"header": read, "draw": draw, "draw and decode": draw_and_decode, "copy": copy}


def show_stages(result: dict[str, Any]) -> None:
    print("\nour stages, microseconds of one core by the image, both views")
    cases = result["cases"]
    columns = [(case, maker) for case, entry in cases.items() for maker in entry["makers"]]
    print(f"  {'':<18}" + "".join(f"{case:>14}" for case, _ in columns))
    print(f"  {'':<18}" + "".join(f"{maker:>14}" for _, maker in columns))
    for stage in next(iter(cases.values()))["makers"]["torch"]:
        cells = [cases[case]["makers"][maker][stage] for case, maker in columns]
        print(f"  {stage:<18}" + "".join(f"{cell:>14.1f}" for cell in cells))


def policy_of(case: Case) -> Policy:
    return preset(case.preset, size=case.size)  # type: ignore[arg-type]


def encoded_facts(encoded: Encoded) -> dict[str, float]:
    return {"images": len(encoded), "kilobytes": sum(map(len, encoded)) / len(encoded) / 1e3}


def facts(photos: Photos) -> dict[str, Any]:
    return {"number": len(photos.images), "from": photos.sources}


def run_stages(photos: Photos, args: argparse.Namespace) -> dict[str, Any]:
    result = stages(photos, args)
    show_stages(result)
    return result


def run_fidelity(photos: Photos, args: argparse.Namespace) -> dict[str, Any]:
    result = fidelity(photos, args.quick)
    show_fidelity(result)
    return {"packages": installed(), "photos": facts(photos), **result}


PARTS: dict[str, Callable[[Photos, argparse.Namespace], dict[str, Any]]] = {
    "speed": speed,
    "stages": run_stages,
    "fidelity": run_fidelity,
}
"""Each prints its tables and returns what the file keeps under its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="of JPEG or PNG photographs, 1024 x 768 or more")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every pipeline in every case")
    parser.add_argument("--quick", action="store_true", help="a few images, two rounds: does it work; writes no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)  # peers draw from these; ours has seeds of its own
    np.random.seed(0)
    torch.manual_seed(0)
    photos = find_photos(args.photos)
    for part in args.part:
        result = PARTS[part](photos, args)
        if not args.quick:
            write_part(part, result, FILE, PARTS)


if __name__ == "__main__":
    main()
