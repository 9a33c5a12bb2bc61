"""SimCLR on Ray: self-supervised image encoders from a bucket of unlabeled images.

The verbs of the command line are functions here, with the same names: `pretrain`, `tune`, `distill`, `evaluate`,
`pack`, `index`, `fetch_data`, `preview`, `embed`, `neighbours`, `export`, `import_weights`, `report`; `load_encoder`
for what a run learned. `nt_xent` is the loss alone and `two_views` the views alone, for any torch program. They are
imported on first use, so that importing the package stays cheap and these two need no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from simclr_ray.version import __version__

if TYPE_CHECKING:
    from simclr_ray.api import (
        RunResult,
        distill,
        embed,
        evaluate,
        export,
        fetch_data,
        import_weights,
        index,
        load_encoder,
        neighbours,
        pack,
        pretrain,
        preview,
        report,
    )
    from simclr_ray.configure import load_config
    from simclr_ray.learn.nt_xent import nt_xent
    from simclr_ray.search.tune import tune
    from simclr_ray.views.library import two_views

_HOMES = {
    "pretrain": "simclr_ray.api",
    "distill": "simclr_ray.api",
    "embed": "simclr_ray.api",
    "evaluate": "simclr_ray.api",
    "export": "simclr_ray.api",
    "load_encoder": "simclr_ray.api",
    "pack": "simclr_ray.api",
    "fetch_data": "simclr_ray.api",
    "import_weights": "simclr_ray.api",
    "index": "simclr_ray.api",
    "RunResult": "simclr_ray.api",
    "load_config": "simclr_ray.configure",
    "neighbours": "simclr_ray.api",
    "nt_xent": "simclr_ray.learn.nt_xent",
    "preview": "simclr_ray.api",
    "report": "simclr_ray.api",
    "tune": "simclr_ray.search.tune",
    "two_views": "simclr_ray.views.library",
}

__all__ = [
    "RunResult",
    "__version__",
    "distill",
    "embed",
    "evaluate",
    "export",
    "fetch_data",
    "import_weights",
    "index",
    "load_config",
    "load_encoder",
    "neighbours",
    "nt_xent",
    "pack",
    "pretrain",
    "preview",
    "report",
    "tune",
    "two_views",
]


def __getattr__(name: str) -> Any:
    """Import a verb when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'simclr_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
