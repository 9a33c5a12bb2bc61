"""What `cluster/grafana.json` and `cluster/alerts.yaml` ask Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).parents[3] / "cluster"
ALERTS = CLUSTER / "alerts.yaml"
BOARD = CLUSTER / "grafana.json"


def board_panels() -> list[dict[str, Any]]:
    """The panels as the board has them."""
    found: list[dict[str, Any]] = json.loads(BOARD.read_text())["panels"]
    return found


def panels() -> dict[str, list[str]]:
    """Queries by the title of their panel, the board's variables filled in."""
    return {
        panel["title"]: [target["expr"].replace("$run", ".*") for target in panel["targets"]]
        for panel in board_panels()
    }


def alerts() -> dict[str, str]:
    """Query by the name of its alert."""
    return {
        rule["alert"]: rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    }


def queries() -> Iterator[str]:
    """All of them."""
    for of_panel in panels().values():
        yield from of_panel
    yield from alerts().values()


def metrics_of(query: str) -> set[str]:
    """Names of metrics in a query."""
    return set(re.findall(r"\b[a-z]+_simclr_\w+", query))
