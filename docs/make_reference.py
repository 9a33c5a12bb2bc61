"""Writes the pages under reference/ from the code: settings from their schema, metrics from their table.

python docs/make_reference.py            # rewrite them
python docs/make_reference.py --check    # fail where they are not what the code says
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from simclr_ray.configure import schema
from simclr_ray.observe.metrics import METRICS

FOLDER = Path(__file__).parent / "reference"
MADE = "<!-- Made by docs/make_reference.py from the code; edit that. -->"


def settings() -> str:
    """Every setting with its type, bounds, default and meaning."""
    whole = schema()
    lines = [
        MADE,
        "",
        "# Settings",
        "",
        "One YAML file of these sections, each key also as `--set section.key=value`. A value left at null is",
        "derived, printed, and written to `resolved.yaml` in the run folder. `simclr-ray config FILE` prints a file",
        "with everything filled in; `simclr-ray config --schema` prints the JSON schema that this page is made of.",
    ]
    for section, reference in whole["properties"].items():
        definition = whole["$defs"][reference["$ref"].rpartition("/")[2]]
        lines += ["", f"## {section}", "", _one_line(definition.get("description", "")), ""]
        lines += ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
        for key, field in definition["properties"].items():
            cells = [f"`{section}.{key}`", _values(field), f"`{json.dumps(field.get('default'))}`", _meaning(field)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """Every metric that a record may carry."""
    lines = [
        MADE,
        "",
        "# Metrics",
        "",
        "What `metrics.jsonl` in the run folder may hold: one JSON object a line with `step` (optimizer steps",
        "done), `samples_seen` (images, by all ranks and attempts), `attempt`, `wall_s` (Unix time) and these. A",
        "value that is not finite is null. TensorBoard and the console take theirs from the same records.",
        "",
        "| name | unit | meaning |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{name}` | {metric.unit} | {_cell(metric.help)} |" for name, metric in METRICS.items()]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings, "metrics.md": metrics}


def stale() -> list[str]:
    """Pages that are not what the code says."""
    return [
        name for name, make in PAGES.items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != make()
    ]


def _values(field: dict[str, Any]) -> str:
    """Type and bounds of a field in words."""
    return _cell(" or ".join(dict.fromkeys(_of_schema(field))))


def _of_schema(field: dict[str, Any]) -> Iterator[str]:
    if "anyOf" in field:
        for one in field["anyOf"]:
            yield from _of_schema(one)
    elif "enum" in field:
        yield from (f"`{value}`" for value in field["enum"])
    elif "const" in field:
        yield f"`{field['const']}`"
    elif field["type"] == "array":
        yield f"list: {' or '.join(dict.fromkeys(_items(field)))}"
    else:
        name = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
        yield name.get(field["type"], field["type"]) + _bounds(field)


def _items(field: dict[str, Any]) -> Iterator[str]:
    for item in [*field.get("prefixItems", []), *([field["items"]] if isinstance(field.get("items"), dict) else [])]:
        yield from _of_schema(item)


def _bounds(field: dict[str, Any]) -> str:
    words = [
        f"{sign} {field[key]:g}" if abs(field[key]) < 1e6 else f"{sign} {field[key]:,}"
        for key, sign in (
            ("minimum", "at least"), ("exclusiveMinimum", "above"),
            ("maximum", "at most"), ("exclusiveMaximum", "below"),
        )
        if key in field
    ]  # fmt: skip
    return f", {', '.join(words)}" if words else ""


def _meaning(field: dict[str, Any]) -> str:
    return _cell(_one_line(field.get("description", "")))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args().check:
        old = stale()
        if old:
            print(f"not what the code says: {', '.join(old)}; run python docs/make_reference.py", file=sys.stderr)
        return int(bool(old))
    FOLDER.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
