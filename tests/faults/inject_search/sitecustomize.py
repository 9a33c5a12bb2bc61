"""Faults inside train workers of a search, by the temperature of the trial they belong to.

SIMCLR_RAY_SEARCH_FAULT="0.2=nan 0.5=crash 1.0=hang" lets the trial of temperature 0.2 see NaN in its images, that of
0.5 lose its worker process and that of 1.0 sleep for ever, each after three steps. Python imports this at start when
its folder is on PYTHONPATH. Nothing of it is in the package; the module under test is imported as it is, and two of its
functions wrapped.
"""

from __future__ import annotations

import os
import sys
import time
from types import ModuleType
from typing import Any

MODULE = "simclr_ray.train.worker"
STEP = 3


def install(module: ModuleType, faults: dict[float, str]) -> None:
    current: dict[str, Any] = {}
    loss, images = module._loss, module.encoder_input

    def watched_loss(config: Any, batch: Any, **options: Any) -> Any:
        current["fault"] = faults.get(config.loss.temperature) if batch.step == STEP else None
        return loss(config, batch, **options)

    def disturbed_images(*arguments: Any, **options: Any) -> Any:
        pixels = images(*arguments, **options)
        match current.get("fault"):
            case "nan":
                pixels = pixels.clone()
                pixels[3, 0, 0, 0] = float("nan")
            case "crash":
                os._exit(1)
            case "hang":
                time.sleep(3600)
        return pixels

    module._loss, module.encoder_input = watched_loss, disturbed_images


def change(module: ModuleType) -> None:
    parts = (part.split("=") for part in os.environ["SIMCLR_RAY_SEARCH_FAULT"].split())
    install(module, {float(temperature): kind for temperature, kind in parts})


if os.environ.get("SIMCLR_RAY_SEARCH_FAULT"):
    from after_import import AfterImport

    sys.meta_path.insert(0, AfterImport(MODULE, change))
