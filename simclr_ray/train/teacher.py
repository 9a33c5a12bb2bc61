"""What a student learns from: the teacher's logits, and labels of a few of the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from simclr_ray import storage
from simclr_ray.config import Config, DistillConfig
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError
from simclr_ray.learn.distillation import distillation
from simclr_ray.learn.nt_xent import NTXent
from simclr_ray.model.encoder import make_encoder
from simclr_ray.model.projector import first_layer, make_projector
from simclr_ray.train.run import RunFolder, open_existing


@dataclass(frozen=True)
class SeenLabels:
    """What a classifier was trained with."""

    sample_ids: npt.NDArray[np.int64]
    """(n,), in the data set's manifest."""
    labels: npt.NDArray[np.int64]
    """(n,)."""
    manifest: str
    """Fingerprint of the data set."""


class Teacher(nn.Module):
    """Encoder, the projector's first layer where it was fine-tuned with it, and classifier; without gradients."""

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Linear,
        layer: nn.Module | None = None,
        seen: SeenLabels | None = None,
        digest: str = "",
    ) -> None:
        super().__init__()
        self.encoder, self.layer, self.head = encoder, layer or nn.Identity(), head
        self.seen, self.digest = seen, digest
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


def classifiers_of(run: RunFolder) -> list[str]:
    """Names of the classifiers that `evaluate` left in a run, below its folder."""
    return sorted(
        uri.removeprefix(f"{run.uri}/") for uri, _ in storage.list_files(run.path("eval"))
        if uri.rpartition("/")[2].startswith("classifier-")
    )  # fmt: skip


def read_classifier(distill: DistillConfig) -> tuple[Config, bytes]:
    """The teacher's config, and the classifier that `evaluate` left in its run.

    Raises:
        ConfigError: no run there, no such classifier in it, or not the one of `distill.digest`.
    """
    assert distill.teacher is not None
    run, config = open_existing(distill.teacher)
    name = distill.classifier or ""
    try:
        data = storage.read_bytes(run.path(name))
    except FileNotFoundError:
        raise ConfigError(
            "the teacher has no such classifier", where=run.path(name), expected=", ".join(classifiers_of(run)) or None,
            fix="make one with: simclr-ray evaluate TEACHER --set evaluate.protocols=[finetune]",
        ) from None  # fmt: skip
    if distill.digest not in (None, storage.digest(data)):
        raise ConfigError(
            "the teacher's classifier is another one than when this student began", where=run.path(name),
            got=storage.digest(data), expected=distill.digest,
            fix="put the file back, or start a student of the new one in a folder of its own",
        )  # fmt: skip
    return config, data


def load_teacher(distill: DistillConfig) -> Teacher:
    """The teacher that `distill` names.

    Raises:
        ConfigError: as `read_classifier`.
    """
    config, data = read_classifier(distill)
    tensors = load_tensors(data)
    parts = {
        part: {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        for part in ("encoder", "layer", "head", "seen")
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
    seen = None
    if parts["seen"]:
        ids, labels = (parts["seen"][name].numpy() for name in ("sample_ids", "labels"))
        seen = SeenLabels(ids, labels, _metadata(data).get("manifest", ""))
    return Teacher(encoder, head, layer, seen, storage.digest(data))


def _metadata(data: bytes) -> dict[str, str]:
    """Of a safetensors file: its header is JSON, behind eight bytes that give its length."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))


def labels_of_teacher(teacher: Teacher, manifest: Manifest) -> npt.NDArray[np.int64]:
    """Labels by sample id of the student's images: those that the teacher saw, and -1.

    Raises:
        ConfigError: the teacher saw the labels of another data set.
    """
    seen = teacher.seen
    if seen is None or seen.manifest != manifest.fingerprint:
        raise ConfigError(
            "the teacher's labels are not of the student's data set", where="distill.labels",
            got="a classifier that does not say" if seen is None else f"labels of the manifest {seen.manifest}",
            expected=f"labels of {manifest.folder}, manifest {manifest.fingerprint}",
            fix="evaluate the teacher with evaluate.train set to the student's data.train, or use distill.labels=none",
        )  # fmt: skip
    labels = np.full(manifest.rows, -1, np.int64)
    labels[seen.sample_ids] = seen.labels
    return labels


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
