"""What a student learns from: the teacher's logits, and labels of a few of the images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from simclr_ray import storage
from simclr_ray.config import Config, DistillConfig
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.read import read_range, resolve
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.learn.distillation import distillation
from simclr_ray.learn.nt_xent import NTXent
from simclr_ray.model.encoder import make_encoder
from simclr_ray.model.projector import first_layer, make_projector
from simclr_ray.train.run import open_existing


class Teacher(nn.Module):
    """Encoder, the projector's first layer where it was fine-tuned with it, and classifier; without gradients."""

    def __init__(self, encoder: nn.Module, head: nn.Linear, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.layer, self.head = encoder, layer or nn.Identity(), head
        self.eval().requires_grad_(False)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.head.out_features

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 3, S, S) -> logits (n, C)."""
        logits: Tensor = self.head(self.layer(self.encoder(images)))
        return logits


def load_teacher(distill: DistillConfig) -> Teacher:
    """The classifier that `evaluate` left in the teacher's run.

    Raises:
        ConfigError: no run there, or no such classifier in it.
    """
    assert distill.teacher is not None
    run, config = open_existing(distill.teacher)
    name = distill.classifier or ""
    try:
        tensors = load_tensors(storage.read_bytes(run.path(name)))
    except FileNotFoundError:
        found = sorted(uri.removeprefix(f"{run.uri}/") for uri, _ in storage.list_files(run.path("eval"))
                       if uri.rpartition("/")[2].startswith("classifier-"))  # fmt: skip
        raise ConfigError(
            "the teacher has no such classifier", where=run.path(name), expected=", ".join(found) or None,
            fix="make one with: simclr-ray evaluate TEACHER --set evaluate.protocols=[finetune]",
        ) from None  # fmt: skip
    parts = {
        part: {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        for part in ("encoder", "layer", "head")
    }
    model = config.model
    encoder = make_encoder(model.encoder, width=model.width, stem=model.stem)
    encoder.load_state_dict(parts["encoder"])
    classes, width = parts["head"]["weight"].shape
    head = nn.Linear(width, classes)
    head.load_state_dict(parts["head"])
    layer = None
    if parts["layer"]:
        projector = make_projector(encoder.embedding_dim, layers=model.projector_layers, hidden_dim=width)
        layer = first_layer(projector)
        assert layer is not None, "it was fine-tuned"
        layer.load_state_dict(parts["layer"])
    return Teacher(encoder, head, layer)


def labels_of_few(manifest: Manifest, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Labels by sample id, -1 for images whose label is not seen: of each class the same part, one at least.

    Raises:
        DataError: the data set has no labels.
    """
    labels = np.full(manifest.rows, -1, np.int64)
    for shard in range(len(manifest.table)):
        first = int(manifest.table.first_rows[shard])
        for group, rows in enumerate(manifest.table.groups_of(shard).tolist()):
            table = read_range(resolve(manifest, Piece(shard, group, 0, rows, first)), ["label"], manifest.image_column)
            if table["label"].null_count:
                raise DataError("the data set has no labels, which distill.label_fraction needs", where=manifest.folder)
            labels[first : first + rows] = table["label"].to_numpy()
            first += rows
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(labels))
    seen = np.full(len(labels), -1, np.int64)
    for label in np.unique(labels).tolist():
        chosen = order[labels[order] == label]
        chosen = chosen[: max(1, round(fraction * len(chosen)))]
        seen[chosen] = label
    return seen


def loss_from_teacher(
    config: Config, labels: npt.NDArray[np.int64] | None, sample_ids: npt.NDArray[np.int64]
) -> Callable[[Tensor], NTXent]:
    """The loss of a step whose outputs are the student's logits and then the teacher's, of both views of each image."""

    def loss(outputs: Tensor) -> NTXent:
        known = None
        if labels is not None:
            known = torch.from_numpy(np.tile(labels[sample_ids], 2)).to(outputs.device)
        of_all = partial(distillation, temperature=config.distill.temperature, rows=2 * config.train.global_batch)
        return of_all(outputs, labels=known, alpha=config.distill.alpha)

    return loss
