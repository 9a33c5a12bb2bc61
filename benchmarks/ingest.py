"""Claim: a core that streams through Ray Data makes nearly as many views as one in a plain loop, in bounded memory.

Three parts, each printed as tables and written to benchmarks/results/ingest.json; parts that are not run keep what the
file says of them:

photos    JPEG crops of about 500 x 375 pixels, policy `imagenet` at 224 pixels
small     the Fashion-MNIST images of the clone, the demo's policy at 28 pixels
pressure  the photos, a small object store and a slow consumer for --minutes: no growth, nothing spilled

    python benchmarks/ingest.py [--part photos small pressure] [--photos DIR] [--quick]

Photos come from any folder of large pictures, by default from packages that have some (see views_photos.py). They are
cropped by seed, encoded again at quality 90, and packed into a temporary folder.

How: plain loop and stream take turns, the loop in a fresh process, the stream in a fresh local cluster of two CPUs: one
for a Ray Train worker that does nothing but receive, one for the stream. Both read the same units in the same order and
make the same views. Images a CPU second count the CPU time of every process of the tree, Ray's own included; what
other programs took from the machine meanwhile is said beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from ingest_data import CASE, pack_crops
from ingest_meter import keep_cores
from ingest_plain import STAGES, PlainRun, run_plain
from ingest_ray import CPUS, ROLES, UNIT_ROWS, Sample, Stream, StreamRun, local_ray, run_stream, sampler
from ingest_tables import show_pressure, show_speed
from machine import write_part
from views_photos import find_photos

from simclr_ray.config import DataConfig
from simclr_ray.configure import load_config
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.stream import PlanAddress
from simclr_ray.train.derive import policy_of
from simclr_ray.views.make import how_views_are_made
from simclr_ray.views.policy import preset

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks/results/ingest.json"
FASHION = ROOT / "jobs/data/fashion-mnist/train"
SEED = 0
UNITS_PER_STEP = 4
PACKED_UNITS = 16
"""Of the photos; they are read again and again, in another order each epoch."""
SAMPLE_S = 3.0
STEADY_S = 20.0
"""Until memory is looked at first: the object store must have been filled once."""
SEGMENTS = 3
"""Executions of the stream, for what an execution leaves behind would show as growth too."""
KEPT = 30
"""Samples in the file, at most."""


@contextmanager
def photos(args: argparse.Namespace) -> Iterator[tuple[Stream, dict[str, Any]]]:
    """The photos' stream, and what the data are."""
    found = find_photos(args.photos)
    with tempfile.TemporaryDirectory() as folder:
        manifest = pack_crops(found, Path(folder), 4 if args.quick else PACKED_UNITS, seed=SEED)
        data = DataConfig()
        stream = Stream(
            _address(manifest), preset(CASE.preset, size=CASE.size), UNITS_PER_STEP, data.units_per_task,
            data.steps_ahead, data.prefetch_units,
        )  # fmt: skip
        yield stream, _described(manifest, stream) | {"photos": len(found.images), "from": found.sources}


@contextmanager
def small(args: argparse.Namespace) -> Iterator[tuple[Stream, dict[str, Any]]]:
    """The demo's stream, as its recipe has it; but no further ahead than usual, or it would not be a stream."""
    del args
    config = load_config(str(ROOT / "jobs/fashion_mnist.yaml"), ["run.folder=none", f"data.train={FASHION}"])
    manifest = read_manifest(str(FASHION))
    stream = Stream(
        _address(manifest), policy_of(config.views), config.train.global_batch // UNIT_ROWS,
        config.data.units_per_task, DataConfig().steps_ahead, config.data.prefetch_units,
    )  # fmt: skip
    yield stream, _described(manifest, stream)


def _address(manifest: Manifest) -> PlanAddress:
    return PlanAddress(manifest.folder, manifest.fingerprint, SEED)


def _described(manifest: Manifest, stream: Stream) -> dict[str, Any]:
    return {
        "images": manifest.rows,
        "mean_bytes": round(sum(shard.bytes for shard in manifest.shards) / manifest.rows),
        "view_px": stream.policy.size,
        "views": how_views_are_made("cpu"),
        "units_per_task": stream.units_per_task,
    }


def speed(stream: Stream, data: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Plain loop and stream in turns."""
    seconds = 2.0 if args.quick else args.seconds
    plain_runs: list[PlainRun] = []
    stream_runs: list[StreamRun] = []
    for _ in range(1 if args.quick else args.rounds):
        plain_runs.append(run_plain(stream.address, stream.policy, seconds))
        steps_a_second = plain_runs[-1].images / plain_runs[-1].wall_s / (UNIT_ROWS * stream.units_per_step)
        with local_ray(None):
            stream_runs.append(
                run_stream(stream, max(4, round(1.5 * seconds * steps_a_second)), skip=round(3 * steps_a_second) + 4)
            )
    result = {
        "data": data,
        "decode_limit_images_per_cpu_s": 1e6 / median(run.decode_us for run in plain_runs),
        "plain": [run.as_dict() for run in plain_runs],
        "stream": [run.as_dict() for run in stream_runs],
        "cost_us": costs(plain_runs, stream_runs),
        "idle_cores": mean(sum(run.idle_cores.values()) for run in stream_runs),
        "stream_to_plain": {
            "per_cpu_s": _rate(stream_runs, "cpu_s") / _rate(plain_runs, "cpu_s"),
            "wall": _rate(stream_runs, "wall_s") / _rate(plain_runs, "wall_s"),
        },
    }
    _, loop, ray, idle = (sum(column.values()) for column in result["cost_us"].values())
    result["stream_to_plain"] |= {
        "per_cpu_s_same_moment": loop / (loop + ray),
        "per_cpu_s_same_moment_without_idle": loop / (loop + ray - idle),
    }
    show_speed(result, plain_runs, stream_runs)
    return result


def _rate(runs: list[PlainRun] | list[StreamRun], seconds: str) -> float:
    """Images a second, over all runs together."""
    return sum(run.images for run in runs) / sum(getattr(run, seconds) for run in runs)


def costs(plain_runs: list[PlainRun], stream_runs: list[StreamRun]) -> dict[str, dict[str, float]]:
    """CPU microseconds an image, in columns: the plain loop alone; the stream, without Ray and Ray; Ray doing nothing.

    The machine may have been slower in the stream's runs. What its stage took there is known, and is shared among the
    loop's parts in proportion; all beyond is Ray's.
    """
    parts = ("read", *STAGES, "rest")
    plain = {part: mean(run.stages_us[part] for run in plain_runs) for part in parts}
    images = sum(run.images for run in stream_runs)
    stage = 1e6 * sum(run.stage_s for run in stream_runs) / images
    slower = stage / (sum(plain.values()) - plain["read"])
    loop = {part: slower * value for part, value in plain.items()}
    ray = {role: 1e6 * sum(run.by_role_s[role] for run in stream_runs) / images for role in ROLES}
    ray[ROLES[0]] -= sum(loop.values())
    idle = {role: 1e6 * sum(run.idle_cores[role] * run.wall_s for run in stream_runs) / images for role in ROLES}
    return {"plain loop": plain, "in the stream": loop, "Ray's share": ray, "idle": idle}


def pressure(stream: Stream, args: argparse.Namespace) -> dict[str, Any]:
    """A consumer that takes half of what the stream could make, beside an object store just large enough."""
    plain = run_plain(stream.address, stream.policy, 2.0)
    slow_s = 2.0 * UNIT_ROWS * stream.units_per_step * plain.wall_s / plain.images
    store = args.store_mib << 20
    steps = round(60 * args.minutes / slow_s)
    samples: list[Sample] = []
    with local_ray(store):
        run = run_stream(
            stream, steps, skip=4, slow_s=slow_s, segments=SEGMENTS,
            watch=sampler(os.getpid(), samples, SAMPLE_S, STEADY_S),
        )  # fmt: skip
    result = {
        "store_mib": args.store_mib,
        "allowed_ahead_mib": stream.bytes_ahead / 2**20,
        "slow_s": slow_s,
        "minutes": run.wall_s / 60,
        "segments": SEGMENTS,
        "run": run.as_dict(),
        "series": {name: series([getattr(sample, name) for sample in samples]) for name in Sample._fields[1:]},
        "growth_mib_per_minute": {name: slope(samples, name) for name in ("private_mib", "total_mib", "store_mib")},
        "samples": [[round(value, 1) for value in sample] for sample in samples[:: -(-len(samples) // KEPT)]],
    }
    show_pressure(result)
    return result


def series(values: list[float]) -> dict[str, float]:
    return {"first": values[0], "last": values[-1], "least": min(values), "most": max(values)}


def slope(samples: list[Sample], name: str) -> float:
    """Growth a minute, of the line through all samples."""
    times, values = [s.at_s / 60 for s in samples], [getattr(s, name) for s in samples]
    middle = mean(times)
    spread = sum((t - middle) ** 2 for t in times)
    return sum((t - middle) * v for t, v in zip(times, values, strict=True)) / spread if spread else 0.0


def run_photos(args: argparse.Namespace) -> dict[str, Any]:
    with photos(args) as (stream, data):
        return speed(stream, data, args)


def run_small(args: argparse.Namespace) -> dict[str, Any]:
    with small(args) as (stream, data):
        return speed(stream, data, args)


def run_pressure(args: argparse.Namespace) -> dict[str, Any]:
    with photos(args) as (stream, data):
        return {"data": data, **pressure(stream, args)}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "photos": run_photos,
    "small": run_small,
    "pressure": run_pressure,
}
"""Each prints its tables and returns what the file keeps under its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="of large JPEG or PNG photographs")
    parser.add_argument("--rounds", type=int, default=2, help="turns of plain loop and stream")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of a plain run; the stream runs half as long again"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of part pressure")
    parser.add_argument("--store-mib", type=int, default=1024, help="object store of part pressure")
    parser.add_argument("--quick", action="store_true", help="one short round: does it work; see --output")
    parser.add_argument("--output", type=Path, help=f"default {FILE.name} in results; with --quick, none")
    args = parser.parse_args()
    keep_cores(CPUS)
    output = args.output or (None if args.quick else FILE)
    for part in args.part:
        result = PARTS[part](args)
        if output is not None:
            write_part(part, result, output, PARTS)


if __name__ == "__main__":
    main()
