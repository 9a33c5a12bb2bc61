"""The model card of an export: Markdown that says what the encoder is, what it was measured to do, and how to load it.

Pure text. What comes from strangers (class names, URIs) stays on its line and in its cell, and no credential passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import to_yaml
from simclr_ray.evaluate.table import markdown
from simclr_ray.publish.evaluated import ResultTable
from simclr_ray.publish.layouts import Format, loading_code
from simclr_ray.version import __version__
from simclr_ray.views.policy import Policy


@dataclass(frozen=True)
class Facts:
    """What a card tells."""

    config: Config
    policy: Policy
    format: Format
    step: int
    width: int
    """Length of an embedding."""
    licence: str
    """SPDX identifier, or `unknown`."""
    data_set: str
    """Fingerprint of the manifest that the run was trained on."""
    checked: str
    """How the export was compared with the run's encoder, a sentence."""
    measured: Sequence[ResultTable]
    """What `evaluate` left in the run."""
    checksums: Mapping[str, str]
    """SHA-256 of the files beside the card."""


def model_card(facts: Facts) -> str:
    """The text of README.md."""
    model, policy = facts.config.model, facts.policy
    name = model.encoder + (f" ({model.width}x)" if model.width > 1 else "")
    inputs = (
        "The graph takes `images`, (n, 3, S, S) float32 in [0, 1], and standardises them itself."
        if facts.format == "onnx"
        else f"Pixels are divided by 255{_standardised(policy)}, channels first."
    )
    sections = [
        _front_matter(facts),
        f"# {name}, trained by SimCLR\n\n"
        f"A self-supervised image encoder: images of {policy.size} x {policy.size} pixels become vectors of "
        f"{facts.width} numbers. {_trained(facts)}",
        f"## Use\n\n```python\n{loading_code(model, facts.format)}\n```\n\n"
        f"An image is cropped to the central square of {policy.central_fraction:g} of its short side and resized to "
        f"{policy.size} pixels ({policy.interpolation}{', antialiased' if policy.flavour == 'torchvision' else ''}). "
        f"{inputs}\n\n{facts.checked}",
        f"## Measured\n\n{_measured(facts)}",
        f"## Training\n\nData set: fingerprint `{facts.data_set}`.\n\n```yaml\n{_settings(facts.config)}```",
        "## Licence\n\n"
        + (f"`{_line(facts.licence)}`" if facts.licence != "unknown" else "Whoever made this export did not say."),
        "## Checksums\n\n| file | SHA-256 |\n| --- | --- |\n"
        + "\n".join(f"| {file} | `{digest}` |" for file, digest in sorted(facts.checksums.items())),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: Facts) -> str:
    fields = {
        "license": _line(facts.licence),
        "library_name": {"timm": "timm", "torchvision": "torchvision", "onnx": "onnx"}.get(facts.format, "simclr_ray"),
        "tags": ["image-feature-extraction", "self-supervised", "simclr"],
    }
    return f"---\n{to_yaml(fields)}---"


def _trained(facts: Facts) -> str:
    if not facts.step:
        return "Its weights were made elsewhere and imported."
    seen = facts.step * facts.config.train.global_batch
    return f"It was trained for {facts.step:,} steps, {seen:,} images, by simclr_ray {__version__}."


def _standardised(policy: Policy) -> str:
    if policy.mean is None or policy.std is None:
        return " and used as they are"
    return f", then standardised with mean {list(policy.mean)} and deviation {list(policy.std)}"


def _measured(facts: Facts) -> str:
    if not facts.measured:
        return "Nothing was measured before this export."
    return "\n\n".join(_table(table, facts.step) for table in facts.measured)


def _table(table: ResultTable, step: int) -> str:
    """A table and what it is of; a place is told by its last two parts alone."""
    place = "/".join([part for part in _line(storage.redact(table.test)).split("/") if part][-2:])
    words = f"On the test set `{place}`." if place else "On a test set that is not named."
    if table.other_weights:
        words += " Trained with labels from this encoder on: those weights are not part of this export."
    words += f" Measured by {'; '.join(table.measures)}." if table.measures else ""
    words += f" These are numbers of step {table.step}, not of this export's." if table.step != step else ""
    title = f"### {_line(table.title)}\n\n" if table.title else ""
    return f"{title}{words}\n\n{markdown(table.header, table.rows)}"


def _settings(config: Config) -> str:
    """What decides the weights; places and machines are nobody's business."""
    values = config.model_dump(mode="json")
    chosen = {name: values[name] for name in ("views", "model", "loss", "optim")}
    chosen["train"] = {name: values["train"][name] for name in ("global_batch", "epochs", "steps", "micro_batch")}
    return storage.redact(to_yaml(chosen))


def _line(text: str) -> str:
    """On one line and without the marks that would end a code span or a cell."""
    return ascii(" ".join(text.split()))[1:-1].replace("`", "'").replace("|", "/")
