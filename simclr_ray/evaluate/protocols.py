"""The protocols that train with labels, over seeds and parts of the labels, and their results.

Written beside the probes' into the same folder: `protocols.json` and `protocols.md`, and each protocol's classifier of
the first seed, which `distill` takes as a teacher.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.data.manifest import Manifest
from simclr_ray.evaluate.encode import LabelledSet, TrainedEncoder
from simclr_ray.evaluate.intervals import interval95, percent
from simclr_ray.evaluate.subsets import part_of_labels, read_file_list, rows_of_list
from simclr_ray.evaluate.supervised import (
    Kind,
    Trained,
    TrainingImages,
    accuracy,
    body_of,
    read_training_images,
    recipe_of,
    train_classifier,
)
from simclr_ray.evaluate.table import markdown
from simclr_ray.train.derive import limits_of

Say = Callable[[str], None]
PROTOCOLS_NAME = "protocols.json"
OF_A_CALL = ("seeds", "config", "version")
"""What each row keeps of how it was made: rows of several calls stand in one file."""


@dataclass(frozen=True)
class SupervisedRow:
    """A protocol over its seeds."""

    protocol: str
    """`sgd`, `finetune` or `finetune_v2`."""
    labels: int
    """That were used."""
    part: str
    """Which: such as `1%`, or the list's name."""
    values: tuple[float, ...]
    """Accuracy of each seed on the test set, 0 to 1, after the last step."""
    seconds: float
    """Of all seeds together."""
    steps: int
    batch: int
    epochs: int
    learning_rate: float
    """Of the first step."""
    classifier: str
    """File of the first seed's weights, in the results' folder."""


def measure_supervised(
    config: Config, trained: TrainedEncoder, manifest: Manifest, test: LabelledSet, folder: str, *, num_classes: int,
    about: Mapping[str, Any], say: Say,
) -> list[SupervisedRow]:  # fmt: skip
    """Run the protocols that the config names and write their results; none gives none.

    Raises:
        DataError: the labels do not do.
        NumericsError: a training diverged.
    """
    kinds = [kind for kind in get_args(Kind) if kind in config.evaluate.protocols]
    if not kinds:
        return []
    if "finetune_v2" in kinds and (config.evaluate.label_list or min(config.evaluate.fractions) < 1):
        body_of(trained, "finetune_v2", everything=False)  # which may refuse: before others train for hours
    images = read_training_images(manifest, limits_of(config.data))
    rows = []
    for kind in kinds:
        for part, rows_of in _parts(config, kind, images, num_classes):
            say(f"  training: {kind} on {part} of the labels, {len(config.evaluate.seeds)} seeds")
            rows.append(_over_seeds(
                config, trained, images, test, folder, kind, part, rows_of, num_classes, manifest.fingerprint,
            ))  # fmt: skip
    _write(folder, rows, about)
    return rows


def supervised_text(rows: Sequence[SupervisedRow]) -> str:
    """The results as plain text, a line each."""
    return "\n".join(
        f"{row.protocol:11s} {row.part:>8s} ({row.labels:,} labels)  {percent(row.values)}  {row.seconds:.0f} s"
        for row in rows
    )


def finite(value: Any) -> Any:
    """The value with null for each number that is not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


RowsOf = Callable[[int], Tensor]
"""The rows that a seed uses."""


def _parts(config: Config, kind: Kind, images: TrainingImages, num_classes: int) -> list[tuple[str, RowsOf]]:
    wanted = config.evaluate

    def balanced(fraction: float) -> RowsOf:
        return lambda seed: part_of_labels(images.labels, fraction, num_classes, seed)

    if kind == "sgd":
        return [("100%", balanced(1.0))]
    if wanted.label_list is None:
        return [(f"{100 * fraction:g}%", balanced(fraction)) for fraction in wanted.fractions]
    rows = rows_of_list(read_file_list(wanted.label_list), images.uris, wanted.label_list)
    name = wanted.label_list.rstrip("/").rpartition("/")[2]
    return [("".join(c if c.isalnum() or c in "._-" else "_" for c in name), lambda seed: rows)]


def _over_seeds(
    config: Config, trained: TrainedEncoder, images: TrainingImages, test: LabelledSet, folder: str, kind: Kind,
    part: str, rows_of: RowsOf, num_classes: int, manifest: str,
) -> SupervisedRow:  # fmt: skip
    values, seconds, steps = list[float](), 0.0, 0
    limits, wanted = limits_of(config.data), config.evaluate
    name = f"classifier-{kind}-{part.replace('%', 'pc')}.safetensors"
    for seed in wanted.seeds:
        chosen = images.rows(rows_of(seed))
        recipe = recipe_of(
            kind, labels=len(chosen.labels), of=len(images.labels), batch=wanted.supervised_batch,
            epochs=wanted.supervised_epochs, seed=seed,
        )  # fmt: skip
        body, width = body_of(trained, kind, everything=len(chosen.labels) == len(images.labels))
        made = train_classifier(body, width, chosen, trained.policy, limits, recipe, num_classes=num_classes)
        values.append(accuracy(made, test.views, test.labels, trained.policy))
        seconds, steps = seconds + made.seconds, made.steps
        if len(values) == 1:
            storage.write_bytes(storage.join(folder, name), _classifier(made, chosen, manifest))
    return SupervisedRow(
        kind, len(chosen.labels), part, tuple(values), round(seconds, 3), steps, recipe.batch, recipe.epochs,
        recipe.peak, name,
    )  # fmt: skip


def _classifier(made: Trained, images: TrainingImages, manifest: str) -> bytes:
    """Names under `encoder.`, `head.`, of v2's fine-tuning `layer.`, and `seen.`: the labels used, by sample id."""
    tensors = dict(made.body.state_dict())
    tensors |= {f"head.{name}": value for name, value in made.head.state_dict().items()}
    tensors |= {"seen.sample_ids": torch.from_numpy(images.ids), "seen.labels": images.labels}
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return bytes(save_tensors(ready, metadata={"manifest": manifest}))


def _write(folder: str, rows: Sequence[SupervisedRow], about: Mapping[str, Any]) -> None:
    how = {name: about[name] for name in OF_A_CALL}
    made = [finite(asdict(row) | {"interval95": interval95(row.values)._asdict()} | how) for row in rows]
    kept = _of_the_same(folder, about, {(row.protocol, row.part) for row in rows})
    numbers = {**about, "rows": [*kept, *made]}
    storage.write_bytes(storage.join(folder, PROTOCOLS_NAME), json.dumps(numbers, indent=1, allow_nan=False).encode())
    header = ["protocol", "labels", "top-1 %, 95 % interval", "seeds", "seconds"]
    body = [
        [f"{row['protocol']}, {row['part']}", f"{row['labels']:,}", percent(row["values"]), str(len(row["values"])),
         f"{row['seconds']:.0f}"]
        for row in numbers["rows"]
    ]  # fmt: skip
    storage.write_bytes(storage.join(folder, "protocols.md"), markdown(header, body).encode())


def _of_the_same(folder: str, about: Mapping[str, Any], anew: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of other protocols and parts that an earlier call left of the same checkpoint and data."""
    try:
        before = json.loads(storage.read_bytes(storage.join(folder, PROTOCOLS_NAME)))
        same = all(before[name] == about[name] for name in ("step", "test", "manifests"))
        return [row for row in before["rows"] if same and (row["protocol"], row["part"]) not in anew]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
