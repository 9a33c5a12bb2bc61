"""Faults inside train workers, for tests: Python imports this at start when its folder is on PYTHONPATH.

SIMCLR_RAY_FAULT="nan rank=1 step=7" makes one pixel of that rank's images of that step NaN, as a broken memory would.
"hang rank=1 step=7 once=FILE" lets the rank sleep there for ever, once: the file says that it has happened. "die ..."
ends it there as SIGKILL does, while the others wait in a collective; "die_saving step=10 ..." in the middle of that
checkpoint.
"oom rank=1 step=7" is what torch raises where a GPU's memory is full.
Nothing of this is in the package; the module under test is imported as it is, and some of its functions wrapped.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "simclr_ray.train.worker"


def install(module: ModuleType, kind: str, rank: int, step: int, once: str) -> None:
    import torch.distributed as dist

    current: dict[str, int] = {}
    loss, images = module._loss, module.encoder_input

    def watched_loss(config: Any, batch: Any, **options: Any) -> Any:
        current["step"] = batch.step  # made before the forward pass of its step; batches are fetched ahead
        return loss(config, batch, **options)

    def disturbed_images(*arguments: Any, **options: Any) -> Any:
        pixels = images(*arguments, **options)
        if current.get("step") == step and dist.get_rank() == rank:
            if kind == "oom":
                torch = sys.modules["torch"]
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if kind == "nan":
                pixels = pixels.clone()
                pixels[3, 0, 0, 0] = float("nan")
            elif kind in ("hang", "die") and not Path(once).exists():
                Path(once).touch()
                if kind == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(3600)
        return pixels

    encoded = module.ckpt._encoded

    def disturbed_encoding(name: str, checkpoint: Any, state: Any) -> bytes:
        if name.startswith("optimizer") and checkpoint.step == step and not Path(once).exists():
            Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return encoded(name, checkpoint, state)

    if kind == "die_saving":
        module.ckpt._encoded = disturbed_encoding
    module._loss, module.encoder_input = watched_loss, disturbed_images


def change(module: ModuleType) -> None:
    kind, *parts = os.environ["SIMCLR_RAY_FAULT"].split()
    values = dict(part.split("=", 1) for part in parts)
    install(module, kind, int(values["rank"]), int(values["step"]), values.get("once", ""))


if os.environ.get("SIMCLR_RAY_FAULT"):
    from after_import import AfterImport

    sys.meta_path.insert(0, AfterImport(MODULE, change))
