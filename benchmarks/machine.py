"""What a figure was measured on; every result file begins with it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, str | int]:
    cpu = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "torch", "numpy")},
    }


def write_part(part: str, result: dict[str, Any], file: Path, order: Iterable[str]) -> None:
    """Replace one part, machine first. Parts that another machine measured keep its description with them."""
    old = json.loads(file.read_text()) if file.exists() else {}
    now, then = machine(), old.pop("machine", None)
    for kept in old.values():
        if then != now:
            kept.setdefault("machine", then)
    parts = old | {part: result}
    ordered = {name: parts[name] for name in [*order, *parts] if name in parts}
    file.write_text(json.dumps({"machine": now, **ordered}, indent=1) + "\n")
