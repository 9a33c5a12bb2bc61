"""`env`: what a bug report must say of a machine, with nothing in it that should stay there.

Variables of the environment are shown only where they bear on this project, and values of those whose names are
credentials' never. All of it passes the redaction of logs too. No network is used and Ray is not started.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from simclr_ray import storage
from simclr_ray.observe.console import printable
from simclr_ray.storage.redaction import GONE, is_credential_name, redact
from simclr_ray.version import __version__
from simclr_ray.views.make import how_views_are_made

PACKAGES = (
    "ray", "torch", "torchvision", "timm", "numpy", "pyarrow", "pillow", "simplejpeg", "opencv-python-headless",
    "opencv-python", "safetensors", "pydantic", "botocore", "s3fs", "fsspec", "matplotlib", "tensorboard", "triton",
    "faiss-cpu", "onnx", "onnxruntime", "onnxscript", "optuna", "umap-learn", "numba",
)  # fmt: skip
VARIABLES = re.compile(
    r"^(?:RAY_|AWS_|SIMCLR_|CUDA_|NCCL_|GLOO_|TORCH|PYTORCH_|OMP_|MKL_|OPENBLAS_|SLURM_|KUBERNETES_SERVICE|HTTPS?_PROXY|"
    r"NO_PROXY|LD_PRELOAD|PYTHON(?:PATH|HASHSEED)|LANG|LC_ALL)",
    re.IGNORECASE,
)
_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
"""What stands before a host may be a token by itself."""


def environment_block(environment: Mapping[str, str] | None = None) -> str:
    """The block: a line each of versions, machine, stores and variables.

    Args:
        environment: Variables; those of this process without it.
    """
    variables = os.environ if environment is None else environment
    lines = [*_versions(), *_machine(), *_stores(), *_variables(variables)]
    width = max(len(name) for name, _ in lines)
    # Each value by itself: a key that ends one line must not be read together with the next line's name.
    return "\n".join(f"{name:<{width}}  {redact(printable(value))}" for name, value in lines)


def masked(name: str, value: str) -> str:
    """A variable's value, or a word in its place where its name or shape is a credential's."""
    if is_credential_name(name):
        return GONE if value else "(empty)"
    return redact(_USER.sub(GONE, value))


def _versions() -> Iterator[tuple[str, str]]:
    yield "simclr-ray", f"{__version__} at {_home(str(Path(__file__).parents[1]))}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}) at {_home(sys.executable)}"
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _machine() -> Iterator[tuple[str, str]]:
    yield "system", platform.platform()
    yield "processor", _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    yield "cores", f"{cores} usable of {os.cpu_count()}"
    yield "memory", _memory()
    yield "cuda", f"{torch.version.cuda or 'none'} in torch; {torch.cuda.device_count()} devices"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"gpu {index}", f"{properties.name}, {properties.total_memory >> 20} MiB"
    yield "views", how_views_are_made("cpu")


def _stores() -> Iterator[tuple[str, str]]:
    settings = storage.current()
    yield "s3 endpoint", settings.endpoint or "AWS's own, or as the environment says"
    yield "s3 region", settings.region or "as the environment or profile says"


def _variables(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in sorted(variables):
        if VARIABLES.match(name):
            yield name, _home(masked(name, variables[name]))


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{pages * size / 2**30:.1f} GiB"


def _home(text: str) -> str:
    """A path without the user's name in it."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
