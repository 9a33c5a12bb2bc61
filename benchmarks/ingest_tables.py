"""What benchmarks/ingest.py prints: its results as tables."""

from __future__ import annotations

from typing import Any

from ingest_plain import PlainRun
from ingest_ray import UNIT_ROWS, StreamRun

BAR = 0.85
"""What the stream should reach of the plain loop, an image and CPU second."""
GROWTH_MIB_PER_MINUTE = 5.0
"""Called growth above this; a lost unit of views would be 18 MiB."""
SERIES = {
    "private_mib": "memory of all processes, private",
    "total_mib": "the same and shared, once",
    "store_mib": "objects in the object store",
    "spilled_mib": "spilled to disk",
}


def show_speed(result: dict[str, Any], plain_runs: list[PlainRun], stream_runs: list[StreamRun]) -> None:
    data = result["data"]
    print(
        f"\n{data['images']} images of {data['mean_bytes'] / 1000:.1f} kB, two views of {data['view_px']} px, "
        f"{data['views']}; tasks of {data['units_per_task']} units of {UNIT_ROWS}"
    )
    print(f"  {'':<22}{'images/s':>10}{'/ CPU second':>14}{'cores':>8}{'others':>8}{'load':>7}")
    print(f"  {'decode limit':<22}{'':>10}{result['decode_limit_images_per_cpu_s']:>14.0f}")
    for name, runs in (("plain loop", plain_runs), ("Ray Data stream", stream_runs)):
        for run in runs:
            print(
                f"  {name:<22}{run.images / run.wall_s:>10.0f}{run.images / run.cpu_s:>14.0f}"
                f"{run.cpu_s / run.wall_s:>8.2f}{run.others_cores:>8.2f}{run.load:>7.2f}"
            )
    ratio = result["stream_to_plain"]
    print(f"  stream / plain loop: {ratio['per_cpu_s']:.3f} by CPU time, {ratio['wall']:.3f} by wall time")
    same = ratio["per_cpu_s_same_moment"]
    print(
        f"  by CPU time, the loop as fast as it was inside the stream: {same:.3f}"
        + ("" if same >= BAR else f", BELOW {BAR}")
        + f"; without the {result['idle_cores']:.3f} cores that Ray takes when the stream stands still: "
        f"{ratio['per_cpu_s_same_moment_without_idle']:.3f}"
    )
    plain, loop, ray, idle = result["cost_us"].values()
    whole = sum(loop.values()) + sum(ray.values())
    print(f"\n  {'CPU time an image, us':<26}{'plain loop':>12}{'stream':>10}{'':>8}{'standing still':>16}")
    for part, value in loop.items():
        print(f"    {part:<24}{plain[part]:>12.1f}{value:>10.1f}{value / whole:>8.1%}")
    mine = sum(loop.values())
    print(f"  {'together':<26}{sum(plain.values()):>12.1f}{mine:>10.1f}{mine / whole:>8.1%}")
    for role, value in ray.items():
        print(f"    {role:<24}{'':>12}{value:>10.1f}{value / whole:>8.1%}{idle[role]:>16.1f}")
    rest, still = sum(ray.values()), sum(idle.values())
    label = "Ray's share"
    print(f"  {label:<26}{'':>12}{rest:>10.1f}{rest / whole:>8.1%}{still:>16.1f}")


def show_pressure(result: dict[str, Any]) -> None:
    run = result["run"]
    print(
        f"\nobject store of {result['store_mib']} MiB, {result['allowed_ahead_mib']:.0f} MiB allowed ahead; "
        f"{result['minutes']:.1f} minutes, {result['segments']} segments, a pause of {result['slow_s']:.2f} s a step: "
        f"{run['images'] / run['wall_s']:.0f} images/s; waited {run['wait_s'] / run['wall_s']:.2%} of the time"
    )
    print(f"  {'MiB':<34}{'first':>9}{'last':>9}{'least':>9}{'most':>9}{'a minute':>10}")
    for name, label in SERIES.items():
        row = result["series"][name]
        growth = result["growth_mib_per_minute"].get(name)
        cells = "".join(f"{row[key]:>9.0f}" for key in ("first", "last", "least", "most"))
        print(f"  {label:<34}{cells}{'' if growth is None else f'{growth:>10.2f}'}")
    grown = result["growth_mib_per_minute"]["private_mib"] > GROWTH_MIB_PER_MINUTE
    spilled = result["series"]["spilled_mib"]["most"] > 0
    print(f"  {'GROWS' if grown else 'no growth'}, {'SPILLED' if spilled else 'nothing spilled'}")
