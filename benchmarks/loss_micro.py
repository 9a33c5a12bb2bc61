"""The part `micro` of benchmarks/loss.py: one training step of a ResNet with and without gradient-cached micro-batches.

The small encoder with frozen batch norm (where the two are the same function) on random images; every step in a fresh
process, which reports the growth of its resident set, its time and the gradient of all parameters.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from loss_processes import measured_peak, run_once

from simclr_ray.configure import load_config
from simclr_ray.learn.micro_batch import backward_in_micro_batches
from simclr_ray.learn.nt_xent import distributed_nt_xent
from simclr_ray.model.batch_norm import calibrating
from simclr_ray.train.build import build_model

SIDE = 32
TEMPERATURE = 0.2


def step(images: int, micro_batch: int, file: str) -> dict[str, float]:
    torch.set_num_threads(2)
    model = build_model(load_config({"model": {"encoder": "small", "zero_init_last": False}})).train()
    views = torch.randint(
        0, 256, (images, 2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    def encode(piece: torch.Tensor) -> torch.Tensor:
        return model(piece.transpose(0, 1).flatten(0, 1).float() / 255)

    with calibrating(model):  # leaves batch norm in evaluation mode
        encode(views[:64])
    loss_of = functools.partial(distributed_nt_xent, temperature=TEMPERATURE)

    def whole_step(of: torch.Tensor, size: int) -> float:
        pieces = of.split(size)
        return backward_in_micro_batches(model, pieces, encode=encode, loss_of=loss_of).loss.item()

    whole_step(views[:8], 4)  # loads libraries
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    loss, peak = measured_peak(lambda: whole_step(views, micro_batch))
    seconds = time.perf_counter() - started
    torch.save(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), file)
    return {"loss": loss, "peak_bytes": peak, "seconds": seconds}


def micro(images: int) -> dict[str, Any]:
    """Peak memory of a step at B = `images`, whole and in micro-batches, and how far the gradients are apart."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = None
        for size in (images, images // 4, images // 16):
            file = str(Path(folder) / f"{size}.pt")
            entry = run_once(step, images, size, file)
            gradient = torch.load(file).double()
            whole = gradient if whole is None else whole
            results[str(size)] = entry | {"gradient_error": float((gradient - whole).norm() / whole.norm())}
    return {"images": images, "side": SIDE, "encoder": "small, frozen batch norm", "micro_batches": results}


def show_micro(result: dict[str, Any]) -> None:
    print(f"\none step of the small encoder, B = {result['images']}, {SIDE} px, frozen batch norm, two threads")
    print(f"  {'micro-batch':>12}{'peak MB':>10}{'/ whole':>9}{'s':>8}{'/ whole':>9}{'gradient error':>16}")
    first = next(iter(result["micro_batches"].values()))
    for size, entry in result["micro_batches"].items():
        print(
            f"  {size:>12}{entry['peak_bytes'] / 1e6:>10.0f}{entry['peak_bytes'] / first['peak_bytes']:>9.3f}"
            f"{entry['seconds']:>8.1f}{entry['seconds'] / first['seconds']:>9.2f}{entry['gradient_error']:>16.1e}"
        )
