"""Claim: images stream from an object store nearly as fast as from a local disk, in few requests.

    python benchmarks/store.py [--part read layouts listing] [--photos DIR] [--quick]

read     the same shards of photo crops (500 x 375, 30 kB) on a local disk and on a real S3 server (SeaweedFS) on this
         machine: units through the views' stage by one process, in turns; requests and bytes an image; time to the
         first unit; and with every answer of the server delayed, as by a network
layouts  the same crops in the bucket as canonical shards, tars, Parquet of others and loose objects: requests and bytes
         of a first reading, footers included, an image
listing  `simclr-ray index`'s listing of 500 to 50,000 objects, in folders of 5 to 5,000: seconds and requests against
         both, beside the law of data/listing.py: about four requests a job, and one for each further 1,000 objects; a
         folder is a job, but what fits into one page is one job

Server and reader share the machine's cores, so the ratio is a floor: what the server takes is counted against S3.
Writes benchmarks/results/store.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import torch
from ingest_data import CASE, write_crops
from machine import write_part
from views_photos import encoded_crops, find_photos

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from simclr_ray import storage  # noqa: E402
from simclr_ray.api import index  # noqa: E402
from simclr_ray.data.decode import Limits  # noqa: E402
from simclr_ray.data.listing import PAGE, list_folder  # noqa: E402
from simclr_ray.data.manifest import UNIT_ROWS, Manifest  # noqa: E402
from simclr_ray.data.plan import Plan, UnitTable  # noqa: E402
from simclr_ray.data.shards import ImageRow  # noqa: E402
from simclr_ray.data.units import plan_tasks, read_task  # noqa: E402
from simclr_ray.storage.counting import Counters  # noqa: E402
from simclr_ray.views.policy import preset  # noqa: E402
from simclr_ray.views.stage import ViewStage  # noqa: E402
from tests.integration import sources  # noqa: E402
from tests.servers.proxy import Fault, Proxy  # noqa: E402
from tests.servers.seaweed import Seaweed  # noqa: E402

FILE = ROOT / "benchmarks/results/store.json"
DELAY_S = 0.05
UNITS_PER_TASK = 8
PARTS = ("read", "layouts", "listing")


def tables(manifest: Manifest, units: int) -> Iterator[pa.Table]:
    """The first units of the first epoch, in the tasks and with the reading ahead of the stream."""
    for task in plan_tasks(manifest, Plan(UnitTable(manifest), 1), 0, units, UNITS_PER_TASK):
        yield from read_task(task)


def an_image(before: Counters, images: int) -> dict[str, float]:
    """What the store was asked for since."""
    after = storage.counters()
    return {
        "requests_an_image": (after.requests - before.requests) / images,
        "bytes_an_image": (after.bytes - before.bytes) / images,
    }


def units_per_s(manifest: Manifest, units: int, stage: ViewStage) -> dict[str, float]:
    """Read units and make their views."""
    before, first = storage.counters(), None
    started = time.monotonic()
    images = 0
    for table in tables(manifest, units):
        first = first if first is not None else time.monotonic() - started
        stage.columns({name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names})
        images += len(table)
    seconds = time.monotonic() - started
    assert first is not None
    return {"images_per_s": images / seconds, "first_unit_s": first, **an_image(before, images)}


def read(server: Seaweed, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    units, rounds = (8, 2) if args.quick else (48, 5)
    crops = encoded_crops(find_photos(args.photos), CASE, units * UNIT_ROWS)
    local, stored = (write_crops(crops, place) for place in (str(scratch / "crops"), "s3://bench/crops"))
    stage = ViewStage(preset("imagenet"), 1, Limits())
    torch.set_num_threads(1)
    places = {"local disk": (local, None), "S3": (stored, server.endpoint)}
    with Proxy(server.endpoint) as proxy:
        proxy.fault(Fault("late", times=-1, seconds=DELAY_S))
        places[f"S3, answers {1000 * DELAY_S:.0f} ms late"] = (places["S3"][0], proxy.endpoint)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in places}
        for turn in range(rounds):
            for name in list(places)[turn % 3 :] + list(places)[: turn % 3]:
                manifest, endpoint = places[name]
                storage.configure(storage.StorageSettings(endpoint=endpoint))
                found[name].append(units_per_s(manifest, units, stage))
    result: dict[str, Any] = {
        name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    floor = result["local disk"]["images_per_s"]
    size = mean_size(crops)
    print(f"\n{len(crops)} images of {size:,.0f} bytes, {rounds} turns, one process")
    print(f"  {'':<26}{'images/s':>10}{'of local':>10}{'first unit, s':>15}{'requests/image':>16}{'bytes/image':>13}")
    for name, one in result.items():
        one["of_local"] = one["images_per_s"] / floor
        print(
            f"  {name:<26}{one['images_per_s']:>10.0f}{one['of_local']:>10.0%}{one['first_unit_s']:>15.3f}"
            f"{one['requests_an_image']:>16.4f}{one['bytes_an_image']:>13,.0f}"
        )
    return result


def mean_size(crops: Sequence[bytes]) -> float:
    return sum(map(len, crops)) / len(crops)


def upload(folder: Path, place: str) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(16) as pool:
        names = [f"{place}/{file.relative_to(folder)}" for file in files]
        list(pool.map(lambda name, file: storage.write_bytes(name, file.read_bytes()), names, files))


def layouts(scratch: Path, crops: Sequence[bytes]) -> Iterator[tuple[str, Manifest]]:
    """The same images in the bucket as others lay them out, each indexed where it lies."""
    yield "canonical shards", write_crops(crops, "s3://bench/layouts/canonical")
    rows = [ImageRow(crop, number % 8, f"{number:06d}.jpg") for number, crop in enumerate(crops)]
    others = {
        "tars": sources.tars(scratch / "tars", rows, each=256),
        "Parquet of others": sources.parquet(scratch / "parquet", rows, each=400, group=100),
        "loose objects": sources.loose(scratch / "loose", rows),
    }
    for name, folder in others.items():
        place = f"s3://bench/layouts/{folder.name}"
        upload(folder, place)
        yield name, index(place, f"{place}-index").manifest


def each_layout(server: Seaweed, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    storage.configure(storage.StorageSettings(endpoint=server.endpoint))
    crops = encoded_crops(find_photos(args.photos), CASE, (4 if args.quick else 16) * UNIT_ROWS)
    result = {}
    print(f"\n{len(crops)} images of {mean_size(crops):,.0f} bytes, each layout read once")
    print(f"  {'':<26}{'requests/image':>16}{'bytes/image':>13}{'of stored':>11}")
    for name, manifest in layouts(scratch, crops):
        before = storage.counters()
        images = sum(len(table) for table in tables(manifest, UnitTable(manifest).num_units))
        assert images == len(crops), (name, images)
        one = an_image(before, images)
        one["read_per_stored"] = one["bytes_an_image"] / mean_size(crops)
        print(f"  {name:<26}{one['requests_an_image']:>16.4f}{one['bytes_an_image']:>13,.0f}", end="")
        print(f"{one['read_per_stored']:>11.2f}", flush=True)
        result[name] = one
    return result


def put(folder: str, count: int, folders: int) -> None:
    """Small objects in folders, so that a listing can fan out."""
    names = (f"{folder}/{i % folders:02d}/{i:06d}.jpg" for i in range(count))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.write_bytes(name, b"x"), names))


def listing(server: Seaweed, scratch: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    result = []
    storage.configure(storage.StorageSettings(endpoint=server.endpoint))
    print(f"\n  {'objects':>10}{'folders':>10}{'seconds':>10}{'requests':>10}{'by the law':>12}{'objects/s':>12}")
    cases = ((100, 20), (400, 20)) if args.quick else ((500, 100), (2000, 100), (8000, 100), (10_000, 10), (50_000, 10))
    for count, folders in cases:
        folder = f"s3://bench/loose-{count}"
        put(folder, count, folders)
        before, started = storage.counters(), time.monotonic()
        found = list_folder(folder, str(scratch / f"listing-{count}"))
        seconds, requests = time.monotonic() - started, storage.counters().requests - before.requests
        assert found is not None
        jobs = folders if count >= PAGE else 1
        law = jobs * (3 + -(-count // (PAGE * jobs)))
        case = {"objects": count, "folders": folders, "seconds": seconds, "requests": requests, "law": law}
        result.append(case)
        print(
            f"  {count:>10,}{folders:>10}{seconds:>10.2f}{requests:>10}{law:>12}{count / seconds:>12,.0f}", flush=True
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--quick", action="store_true", help="small and unrecorded")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server = Seaweed(Path(scratch, "s3"), buckets=("bench",))
        os.environ.update(server.environment())
        server.start()
        try:
            for part in args.part:
                result: Any = {"read": read, "layouts": each_layout, "listing": listing}[part](
                    server, Path(scratch), args
                )
                if not args.quick:
                    write_part(part, result, FILE, PARTS)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
