"""What a run learned: embeddings, probes, tables and pictures.

`simclr_ray.evaluate` is this package and, like every verb, a function: importing a module of the package would put it
in the function's place, so it can be called itself.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Verb(types.ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As `simclr_ray.evaluate.evaluate.evaluate`."""
        from simclr_ray.evaluate.evaluate import evaluate

        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _Verb
