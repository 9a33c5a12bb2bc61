"""From what was read of runs to one HTML page: text is escaped and redacted, pictures are inlined, nothing is fetched.

Names, addresses and class names come from strangers. Every value that the template prints passes `told`: what is not
printable is written as an escape, keys are taken out, and Jinja escapes the rest. The page's policy (CSP) allows its
own style and script by their hashes, pictures inside the page, and nothing else, so that a slip in all this would still
run and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from simclr_ray.observe.console import printable
from simclr_ray.storage.redaction import redact

BEGIN = b"<!doctype html>\n<!-- simclr-ray report -->"
"""How every report begins, by which an old one is known from somebody else's file."""
SECTIONS = (
    ("overview", "Overview"), ("curves", "Learning"), ("results", "Results"), ("health", "Collapse"),
    ("views", "Views"), ("map", "Embeddings"), ("input", "Input"), ("attempts", "Attempts"), ("settings", "Settings"),
)  # fmt: skip


@dataclass(frozen=True)
class Page:
    """What the template needs; see `report.html.j2`."""

    title: str
    subtitle: str
    footer: str
    runs: Sequence[Mapping[str, Any]]
    learning: Sequence[Markup]
    learning_note: str
    """A warning above those charts; may be empty."""
    health: Sequence[Markup]
    input: Sequence[Markup]
    settings: Mapping[str, Any]
    images: bool
    """Whether pictures may be shown."""
    trained: str
    """Name of the strong row of the result tables."""


def render(page: Page) -> bytes:
    """The whole file."""
    style, script = _part("report.css"), _part("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _environment().from_string(_part("report.html.j2"))
    ours = {name: Markup(text) for name, text in (("style", style), ("script", script), ("policy", policy))}  # noqa: S704
    text = template.render(**vars(page), **ours, sections=SECTIONS)
    data = text.encode("utf-8", "backslashreplace")
    assert data.startswith(BEGIN)
    return data


def told(value: object) -> object:
    """A value as it may be shown: markup stays, text is made printable and loses what looks like a key."""
    if isinstance(value, (Markup, bool)) or not isinstance(value, str):
        return value
    return redact(printable(value))


def words(value: object) -> str:
    """`told` for text that goes into a chart."""
    return str(told(str(value)))


def picture(data: bytes, alt: str, *, small: bool = False, name: str = "pixels") -> Markup:
    """An `<img>` with its bytes inside."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return Markup('<img class="{}{}" alt="{}" src="data:image/{};base64,{}">').format(
        name, " small" if small else "", words(alt), kind, base64.b64encode(data).decode()
    )


def as_json(value: object) -> str:
    """JSON for a data attribute, with every string in it told."""
    return json.dumps(_each(value), allow_nan=False)


def _each(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _each(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each(inner) for inner in value]
    return told(value)


def _environment() -> Environment:
    return Environment(
        autoescape=True, finalize=told, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )


def _part(name: str) -> str:
    return (files("simclr_ray.publish") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
