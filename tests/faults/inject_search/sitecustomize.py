"""Faults inside train workers of a search, by the temperature of the trial they belong to.

SIMCLR_RAY_SEARCH_FAULT="0.2=nan 0.5=crash 1.0=hang" lets the trial of temperature 0.2 see NaN in its images, that of
0.5 lose its worker process and that of 1.0 sleep for ever, each after three steps. Python imports this at start when
its folder is on PYTHONPATH. Nothing of it is in the package; the module under test is imported as it is, and two of its
functions wrapped.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
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


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            parts = (part.split("=") for part in os.environ["SIMCLR_RAY_SEARCH_FAULT"].split())
            install(module, {float(temperature): kind for temperature, kind in parts})

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("SIMCLR_RAY_SEARCH_FAULT"):
    sys.meta_path.insert(0, Finder())
