"""A real Prometheus that scrapes one endpoint every second. Debian: `apt-get install prometheus`.

with prometheus(folder, scrape="127.0.0.1:8080", rules=[...]) as server:
    server.range("ray_simclr_train_loss", start, end, 1.0)
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.servers.ray_head import end, wait_for_answer
from tests.servers.seaweed import free_port

STARTED_WITHIN_S = 30.0


def binary() -> str | None:
    """Path of the server; None where it is not installed."""
    return shutil.which("prometheus")


@dataclass(frozen=True)
class Line:
    """One series of an answer."""

    labels: Mapping[str, str]
    times: Sequence[float]
    """Unix, in seconds."""
    values: Sequence[float]


@dataclass(frozen=True)
class Prometheus:
    """Where a server is reached."""

    url: str

    def range(self, query: str, start: float, stop: float, step_s: float) -> list[Line]:
        """What a panel draws: a query at every step between two Unix times."""
        asked = {"query": query, "start": start, "end": stop, "step": step_s}
        found = self._ask(f"query_range?{urllib.parse.urlencode(asked)}")["result"]
        return [
            Line(one["metric"], [at for at, _ in one["values"]], [float(value) for _, value in one["values"]])
            for one in found
        ]

    def rules(self) -> dict[str, str]:
        """Health of each loaded rule by its name: `ok` when its query could be answered."""
        groups = self._ask("rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    def _ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=20) as answer:
            return json.load(answer)["data"]


@contextlib.contextmanager
def prometheus(folder: Path, scrape: str, rules: Sequence[Path] = ()) -> Iterator[Prometheus]:
    """Start a server with a data folder of its own and end it.

    Args:
        folder: For its configuration, data and log.
        scrape: HOST:PORT whose /metrics is read.
        rules: Files of rules, evaluated every second.
    """
    program = binary()
    assert program is not None, "prometheus is not installed (Debian: apt-get install prometheus)"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(file) for file in rules],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [scrape]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    port, log = free_port(), folder / "log"
    command = [
        program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/-/ready", process, log, within_s=STARTED_WITHIN_S)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        end(process)
