"""Time of the loss on one CUDA device: torch tiles against the Triton kernel, beside the bare matmuls.

Decides whether `loss.kernel: triton` should be the default. Needs a GPU and Triton, no Ray.

    python benchmarks/loss_gpu.py [--rows 4096 16384 65536]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from simclr_ray.learn.nt_xent import distributed_nt_xent

DIM, TEMPERATURE, REPEATS = 128, 0.1, 10


def milliseconds(step: Callable[[], object]) -> float:
    step()
    step()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def loss_step(z: Tensor, kernel: str, tile: int | None) -> Callable[[], object]:
    def step() -> None:
        z.grad = None
        distributed_nt_xent(z, TEMPERATURE, kernel=kernel, tile=tile).loss.backward()  # type: ignore[arg-type]

    return step


def bare_matmuls(z: Tensor, tile: int) -> Callable[[], object]:
    """The 4 M^2 D FLOP that symmetry leaves, in tiles, and nothing else."""
    x, gradient = z.detach(), torch.zeros_like(z)
    parts, sums = x.split(tile), gradient.split(tile)
    buffer = x.new_empty(tile, tile)

    def step() -> None:
        for sweep in (0, 1):
            for i, rows in enumerate(parts):
                for j in range(i, len(parts)):
                    torch.mm(rows, parts[j].T, out=buffer)
                    if sweep:
                        torch.addmm(sums[i], buffer, parts[j], out=sums[i])
                        if i != j:
                            torch.addmm(sums[j], buffer.T, rows, out=sums[j])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384, 65536], help="2B; multiples of 4096")
    rows_list = parser.parse_args().rows
    results: dict[str, dict[str, float]] = {}
    for rows in rows_list:
        z = torch.randn(rows, DIM, device="cuda", requires_grad=True)
        entry = {f"torch, tile {tile}": milliseconds(loss_step(z, "torch", tile)) for tile in (2048, 4096, 8192)}
        entry["triton"] = milliseconds(loss_step(z, "triton", None))
        entry["bare matmuls"] = milliseconds(bare_matmuls(z, min(4096, rows)))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_step(z, "torch", None)()
        entry["torch peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        results[str(rows)] = entry
        print(rows, {name: round(value, 2) for name, value in entry.items()})
    device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dim": DIM, "temperature": TEMPERATURE}
    file = Path(__file__).parent / "results" / "loss_gpu.json"
    file.write_text(json.dumps({"machine": device, "ms_by_rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
