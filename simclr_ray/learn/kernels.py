"""Which kernel computes the loss's tiles."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from simclr_ray.errors import ConfigError
from simclr_ray.learn.tiles import LARGEST_PLAIN_LOGIT, Kernel, TorchTiles

KernelName = Literal["torch", "triton"]

CPU_TILE = 512
"""512 x 512 float32 is a megabyte: two or three fit a core's cache. 1024 and more lose a third."""
GPU_TILE = 4096


def make_kernel(name: str, temperature: float, like: Tensor, tile: int) -> Kernel:
    """Choose a kernel for projections such as `like`.

    Args:
        name: Which.
        temperature: Of the loss.
        like: Unit projections.
        tile: Rows and columns of a tile of `TorchTiles`; 0 takes what suits the device.

    Raises:
        ConfigError: The Triton kernel was asked for and cannot compute this.
    """
    if name == "torch":
        return TorchTiles(temperature, tile or (GPU_TILE if like.is_cuda else CPU_TILE))
    reason = _why_not_triton(temperature, like)
    if reason:
        raise ConfigError("the Triton kernel cannot compute this loss", where="loss.kernel", got=reason, fix=_TORCH)
    from simclr_ray.learn.triton_tiles import TritonTiles  # here, for torch for CPUs comes without Triton

    return TritonTiles(temperature)


_TORCH = "use loss.kernel=torch, which takes every device, dtype and temperature"


def _why_not_triton(temperature: float, like: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from simclr_ray.learn.triton_tiles import LARGEST_DIM

    if not like.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"projections on {like.device}"
    if like.is_cuda and torch.cuda.get_device_capability(like.device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(like.device)}; it wants 8.0"
    if like.dtype != torch.float32:
        return f"projections in {like.dtype}"
    if like.shape[-1] > LARGEST_DIM:
        return f"projections of {like.shape[-1]} dimensions; it takes {LARGEST_DIM} at most"
    if 1.0 / temperature > LARGEST_PLAIN_LOGIT:
        return f"temperature {temperature:g}; it takes {1 / LARGEST_PLAIN_LOGIT:.3g} at least"
    return None
