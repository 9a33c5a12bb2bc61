"""Claims: 10^9 images cost the driver and the stream's coordinator less than 500 MB; where each plane stops scaling.

    python benchmarks/scale.py [--part coordinator model] [--quick]

The part `coordinator`: synthetic manifests of shards with 128 groups of 64 images, of Parquet and of tar shards, at
10^9 images and at 10^5:

disk     bytes of the manifest
read     seconds to read it, to check its fingerprint and to sum up its units
first    seconds from there to the read tasks of the first segment of 40,000 units, and so to the epoch's permutation
         of 15.6 million units
next     seconds to the tasks of the segment after it
peak     growth of the resident set of a fresh process that does all this, at its highest
wrap     the same where the second segment reaches into the second epoch, when two permutations are held

Tasks are made as the stream's coordinator makes them (`stream.read_tasks`), which drops a segment's before the next
one's are made. Exits with 1 if a peak is at or above 500 MB. Nothing is read of the shards, for there are none.

The part `model` (scale_model.py): steps of 1 to 8 gloo ranks here beside what the model makes of the rates of
one rank and of collectives between two; then the model for 8 to 4096 workers, with this machine's rates for decoding
and requests, and rates of GPUs and links that are assumed (`ASSUMED`), for none could be measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from loss_processes import measured_peak, run_once
from machine import write_part
from scale_model import modelled

from simclr_ray.data.manifest import UNIT_ROWS, Kind, Manifest, ShardTable, read_manifest, write_manifest
from simclr_ray.data.plan import Segment
from simclr_ray.data.stream import PlanAddress, load_plan, read_tasks

FILE = Path(__file__).parent / "results" / "scale.json"
LIMIT_BYTES = 500_000_000
SIZES = {"1e5": 10**5, "1e9": 10**9}
KINDS: tuple[Kind, ...] = ("parquet", "tar")
GROUPS = 128
MEAN_GROUP_BYTES = 6_400_000
UNITS_PER_TASK, UNITS_PER_SEGMENT = 8, 40_000
SEED = 7
PARTS = ("coordinator", "model")


def synthetic(images: int, kind: Kind, folder: str) -> Manifest:
    """A manifest of shards that do not exist, with group sizes as photographs have them."""
    shards = -(-images // (GROUPS * UNIT_ROWS))
    random = np.random.default_rng(0)
    groups = np.clip(random.normal(MEAN_GROUP_BYTES, 400_000, (shards, GROUPS)), 10**6, None).astype(np.int64)
    ends = np.cumsum(np.concatenate([np.zeros((shards, 1), np.int64), groups // 512 * 512], axis=1), axis=1)
    offsets, each = (ends, GROUPS + 1) if kind == "tar" else (ends[:, -1:], 1)

    def lists(values: np.ndarray, length: int, of: pa.DataType) -> pa.ListArray:
        return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, length, dtype=np.int32), pa.array(values, of))

    table = pa.table({
        "uri": [f"s3://bucket-of-images/web/part-{i // 1000:03d}/{i:06d}.{kind}" for i in range(shards)],
        "kind": [kind] * shards,
        "digest": [random.bytes(16).hex() for _ in range(shards)],
        "version": [random.bytes(16).hex() for _ in range(shards)],
        "bytes": ends[:, -1] + 30_000,
        "rows_per_group": lists(np.full(shards * GROUPS, UNIT_ROWS, np.int32), GROUPS, pa.int32()),
        "offsets": lists(offsets.ravel(), each, pa.int64()),
    })  # fmt: skip
    return Manifest(folder, ShardTable.from_arrow(table))


def written(images: int, kind: Kind, folder: str) -> int:
    """Bytes on disk."""
    return Path(write_manifest(synthetic(images, kind, folder))).stat().st_size


def address_of(folder: str) -> PlanAddress:
    """What the driver gives to the coordinator. The manifest is read for it, in a process of its own."""
    return PlanAddress(folder, read_manifest(folder).fingerprint, SEED)


def tasks_of(address: PlanAddress, start: int, stop: int) -> int:
    """Make the tasks of units [start, stop) as the coordinator does; how many there are."""
    return len(read_tasks(address, Segment(start, start, stop, stop), UNITS_PER_TASK))


def load_libraries() -> None:
    """By a tiny data set, for they are not what is measured."""
    with tempfile.TemporaryDirectory() as folder:
        written(10_000, "tar", folder)
        tasks_of(address_of(folder), 0, 16)
    load_plan.cache_clear()


def from_the_start(address: PlanAddress) -> dict[str, float]:
    """What the coordinator does until the first two segments' tasks stand."""
    load_libraries()

    def work() -> dict[str, float]:
        begun = time.perf_counter()
        units = load_plan(address)[1].units.num_units
        read = time.perf_counter()
        most = min(UNITS_PER_SEGMENT, units)
        count = tasks_of(address, 0, most)
        first = time.perf_counter()
        tasks_of(address, most, 2 * most)
        ended = time.perf_counter()
        seconds = {"read_s": read - begun, "first_s": first - read, "next_s": ended - first}
        return {"units": units, "tasks": count, **seconds}

    result, peak = measured_peak(work)
    return result | {"peak_bytes": peak}


def around_the_end(address: PlanAddress) -> int:
    """Peak of a coordinator that goes from the last segment within an epoch to one that reaches into the next."""
    load_libraries()

    def work() -> None:
        epoch = load_plan(address)[1].units.num_units
        most = min(UNITS_PER_SEGMENT, epoch)
        half = most // 2
        tasks_of(address, max(0, epoch - half - most), epoch - half)
        tasks_of(address, epoch - half, epoch + half)

    return measured_peak(work)[1]


def scale(images: int, kind: Kind) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        disk = run_once(written, images, kind, folder)
        address = run_once(address_of, folder)
        start = run_once(from_the_start, address)
        return {"disk_bytes": disk, **start, "wrap_peak_bytes": run_once(around_the_end, address)}


def show(result: dict[str, dict[str, Any]]) -> None:
    columns = ("disk MB", "units", "read s", "first s", "next s", "peak MB", "wrap MB")
    print(f"\n  {'images':>7}  {'kind':8}" + "".join(f"{name:>12}" for name in columns))
    for images, kinds in result.items():
        for kind, row in kinds.items():
            numbers = [f"{row['disk_bytes'] / 1e6:.2f}", f"{row['units']:,}"]
            numbers += [f"{row[name]:.2f}" for name in ("read_s", "first_s", "next_s")]
            numbers += [f"{row[name] / 1e6:.0f}" for name in ("peak_bytes", "wrap_peak_bytes")]
            print(f"  {images:>7}  {kind:8}" + "".join(f"{number:>12}" for number in numbers))


def coordinator(*, quick: bool) -> dict[str, dict[str, Any]]:
    sizes = {"1e5": SIZES["1e5"]} if quick else SIZES
    result = {name: {kind: scale(images, kind) for kind in KINDS} for name, images in sizes.items()}
    show(result)
    print(f"\n  highest peak {highest_peak(result) / 1e6:.0f} MB, limit {LIMIT_BYTES / 1e6:.0f} MB")
    return result


def highest_peak(result: dict[str, dict[str, Any]]) -> float:
    rows = [row for kinds in result.values() for row in kinds.values()]
    return float(max(max(row["peak_bytes"], row["wrap_peak_bytes"]) for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="10^5 images, two ranks: does it work; see --output")
    parser.add_argument("--output", type=Path, help=f"default {FILE.name} in results; with --quick, none")
    args = parser.parse_args()
    output = args.output or (None if args.quick else FILE)
    failed = False
    for part in args.part:
        result = {"coordinator": coordinator, "model": modelled}[part](quick=args.quick)
        failed |= part == "coordinator" and highest_peak(result) >= LIMIT_BYTES
        if output is not None:
            write_part(part, result, output, PARTS)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
