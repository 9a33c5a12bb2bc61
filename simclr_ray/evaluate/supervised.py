"""Training with labels: the paper's linear probe by SGD (appendix B.6), fine-tuning (B.5), and SimCLR v2's (section 3).

All see random crops and flips and nothing else, use momentum 0.9 (Nesterov's; of v2 that of LARS), a learning rate that
follows the batch and falls as half a cosine from the first step on, no weight decay and no warm-up. The probe learns a
linear layer on the frozen encoder in evaluation mode; fine-tuning learns both. v2's starts from zero logits and keeps
the projector's first layer, but for all labels, where it starts at the embedding. The accuracy is that of the last
step, on central crops: nothing is chosen by the test set. Everything random is addressed by the seed.

One process trains. Steps larger than `IMAGES_AT_ONCE` go through the network in pieces whose gradients are summed; in
fine-tuning, batch norm then takes its statistics from one piece.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_ray.data.decode import Limits, Rejected, decode
from simclr_ray.data.inputs import columns_of, read_inputs
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError, DataError, NumericsError
from simclr_ray.evaluate.encode import Image, TrainedEncoder, row_ranges
from simclr_ray.learn.optim import (
    RateRule,
    learning_rate_at,
    make_optimizer,
    peak_learning_rate,
    set_learning_rate,
)
from simclr_ray.model.projector import first_layer
from simclr_ray.views.apply import normalise, two_views
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import Policy

Kind = Literal["sgd", "finetune", "finetune_v2"]
MOMENTUM = 0.9
RATES: dict[Kind, tuple[RateRule, float]] = {
    "sgd": ("linear", 0.1), "finetune": ("linear", 0.05), "finetune_v2": ("sqrt", 0.005),
}  # fmt: skip
"""How the rate follows the batch: appendix B.6 and B.5 of SimCLR, section 3 of v2 (0.16 at its batch of 1024)."""
BATCH: dict[Kind, int] = {"sgd": 4096, "finetune": 4096, "finetune_v2": 1024}
PROBE_EPOCHS, FEW_EPOCHS, MANY_EPOCHS = 90, 60, 30
"""Appendix B.6; and B.5 for 1 % of the labels, and for 10 % and all of them."""
FEW = 0.02
IMAGES_AT_ONCE = 256
HEAD_STD = 0.01
"""google-research/simclr, tf2/model.py, LinearLayer."""


@dataclass(frozen=True)
class TrainingImages:
    """Labelled images as they are stored, all in memory; those that do not decode are left out."""

    encoded: Sequence[bytes]
    labels: Tensor
    """(n,) int64."""
    ids: np.ndarray
    """(n,) int64, the address of their draws."""
    uris: Sequence[str]

    def rows(self, chosen: Tensor) -> TrainingImages:
        """Some of them."""
        index = chosen.tolist()
        return TrainingImages(
            [self.encoded[i] for i in index], self.labels[chosen], self.ids[index], [self.uris[i] for i in index]
        )


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained."""

    kind: Kind
    batch: int
    epochs: int
    seed: int

    @property
    def peak(self) -> float:
        """Learning rate of the first step."""
        rule, base = RATES[self.kind]
        return peak_learning_rate(rule, base, self.batch)


@dataclass(frozen=True)
class Trained:
    """A classifier and what it cost."""

    body: nn.Sequential
    """`encoder`, and in v2's fine-tuning `layer` of the projector behind it; in evaluation mode."""
    head: nn.Linear
    steps: int
    seconds: float


def read_training_images(manifest: Manifest, limits: Limits) -> TrainingImages:
    """Read a labelled set.

    Raises:
        DataError: an image has no label, or none decodes.
    """
    kept = []
    for row in read_inputs(list(row_ranges(manifest)), columns_of(manifest, "label")):
        if row.lost or row.image is None or isinstance(decode(row.image, limits), Rejected):
            continue
        if row.label is None:
            raise DataError("the data set has no labels, which training with labels needs", where=manifest.folder)
        kept.append(row)
    if not kept:
        raise DataError("no image of the data set decodes", where=manifest.folder)
    return TrainingImages(
        [row.image or b"" for row in kept], torch.tensor([row.label for row in kept]),
        np.array([row.sample_id for row in kept], np.int64), [row.uri for row in kept],
    )  # fmt: skip


def crops_and_flips(policy: Policy) -> Policy:
    """The policy without anything but crops and flips (appendix B.5 and B.6)."""
    return policy.model_copy(update={
        "jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0, "solarize_probability": 0.0,
    })  # fmt: skip


def recipe_of(kind: Kind, *, labels: int, of: int, batch: int | None, epochs: int | None, seed: int) -> Recipe:
    """The paper's recipe for a set of labels.

    Args:
        kind: The protocol.
        labels: How many are used.
        of: How many there are.
        batch: Images of a step, other than the paper's; all labels where there are fewer.
        epochs: Other than the paper's.
        seed: Of order, crops and head.
    """
    usual = PROBE_EPOCHS if kind == "sgd" else FEW_EPOCHS if labels <= FEW * of else MANY_EPOCHS
    return Recipe(kind, min(batch or BATCH[kind], labels), epochs or usual, seed)


def body_of(trained: TrainedEncoder, kind: Kind, *, everything: bool) -> tuple[nn.Sequential, int]:
    """What a protocol puts its linear layer on, the model's own modules; and the width of its output.

    Args:
        trained: What was pretrained.
        kind: The protocol.
        everything: Whether all labels are used: then v2 starts at the embedding, too.

    Raises:
        ConfigError: v2's fine-tuning of a run whose projector has no hidden layer, or none that was trained.
    """
    parts = OrderedDict(encoder=trained.model.encoder)
    if kind != "finetune_v2" or everything:
        return nn.Sequential(parts), trained.width
    layer = first_layer(trained.model.projector) if trained.has_projector else None
    if layer is None:
        raise ConfigError(
            "finetune_v2 starts from the projector's first layer, and this run has no hidden one that was trained",
            where="evaluate.protocols", expected="model.projector_layers of 2 or more (3 in SimCLR v2)",
            fix="use finetune",
        )  # fmt: skip
    return nn.Sequential(parts | {"layer": layer}), cast(nn.Linear, layer[0]).out_features


def train_classifier(
    body: nn.Sequential, width: int, images: TrainingImages, policy: Policy, limits: Limits, recipe: Recipe, *,
    num_classes: int,
) -> Trained:  # fmt: skip
    """Train a linear classifier on the encoder, and the encoder with it where the recipe says so.

    Args:
        body: (n, 3, S, S) -> (n, width), as `body_of` makes it; not changed.
        width: Of its output.
        images: To learn from.
        policy: Size and standardisation of the encoder's input.
        limits: What an image may be.
        recipe: How.
        num_classes: Outputs of the classifier.

    Raises:
        NumericsError: the loss is not finite.
    """
    begun = time.perf_counter()
    learns_all = recipe.kind != "sgd"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = copy.deepcopy(body).to(device).train(learns_all).requires_grad_(learns_all)
    head = _new_head(width, num_classes, recipe).to(device)
    optimizer = _optimizer(nn.ModuleList([head, *([network] if learns_all else [])]), recipe.kind)
    steps = max(1, round(len(images.labels) * recipe.epochs / recipe.batch))
    for step, chosen in enumerate(batches(len(images.labels), recipe.batch, steps, recipe.seed)):
        set_learning_rate(
            optimizer, learning_rate_at(step, peak=recipe.peak, warmup_steps=0, total_steps=steps, schedule="cosine")
        )
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for piece in _pieces(chosen, recipe.batch):
            views = crops(images, piece, policy, limits, recipe.seed)
            with torch.set_grad_enabled(learns_all):
                h = network(normalise(torch.from_numpy(views).to(device), policy))
            rows = torch.tensor([row for row, _ in piece])
            part = F.cross_entropy(head(h), images.labels[rows].to(device), reduction="sum") / recipe.batch
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        if not np.isfinite(loss):
            raise NumericsError(
                f"{recipe.kind} has diverged", got=f"loss {loss} at step {step}",
                fix="use a smaller evaluate.supervised_batch, which lowers the learning rate",
            )  # fmt: skip
        optimizer.step()
    return Trained(network.eval(), head, steps, time.perf_counter() - begun)


def _new_head(width: int, num_classes: int, recipe: Recipe) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    with torch.no_grad():
        head.bias.zero_()
        if recipe.kind == "finetune_v2":
            head.weight.zero_()
        else:
            generator = torch.Generator().manual_seed(recipe.seed)
            head.weight.copy_(HEAD_STD * torch.randn(head.weight.shape, generator=generator))
    return head


def _optimizer(learned: nn.Module, kind: Kind) -> torch.optim.Optimizer:
    if kind == "finetune_v2":
        return make_optimizer("lars", learned, weight_decay=0.0, momentum=MOMENTUM)
    return torch.optim.SGD(learned.parameters(), lr=0.0, momentum=MOMENTUM, nesterov=True)


@torch.inference_mode()
def accuracy(trained: Trained, views: Image, labels: Tensor, policy: Policy) -> float:
    """Fraction of central views (n, S, S, 3) that are classified correctly."""
    hits, device = 0, trained.head.weight.device
    for start in range(0, len(views), IMAGES_AT_ONCE):
        rows = slice(start, start + IMAGES_AT_ONCE)
        logits = trained.head(trained.body(normalise(torch.from_numpy(views[rows]).to(device), policy)))
        hits += int((logits.argmax(dim=1).cpu() == labels[rows]).sum())
    return hits / len(views)


Use = tuple[int, int]
"""A row, and the pass over the data in which it is used."""


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[list[Use]]:
    """The rows of each step: permutations one after another, cut into steps, so that none is left out or repeated."""

    def endless() -> Iterator[Use]:
        epoch = 0
        while True:
            order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
            yield from ((int(row), epoch) for row in order)
            epoch += 1

    source = endless()
    for _ in range(steps):
        yield [next(source) for _ in range(batch)]


def _pieces(chosen: list[Use], batch: int) -> list[list[Use]]:
    """Pieces of nearly one size: batch norm would take bad statistics from a rest of one image."""
    count = -(-batch // IMAGES_AT_ONCE)
    return [[chosen[i] for i in index] for index in np.array_split(np.arange(len(chosen)), count)]


def crops(images: TrainingImages, chosen: list[Use], policy: Policy, limits: Limits, seed: int) -> Image:
    """A random crop, perhaps mirrored, of each image: (n, S, S, 3) uint8."""
    rows = [row for row, _ in chosen]
    decoded = [decode(images.encoded[row], limits) for row in rows]
    pixels = [one for one in decoded if not isinstance(one, Rejected)]
    assert len(pixels) == len(rows), "they decoded before"
    plain = crops_and_flips(policy)
    draws = draw(
        plain, seed=seed, epoch=np.array([epoch for _, epoch in chosen]), sample_ids=images.ids[rows],
        sizes=np.array([one.shape[:2] for one in pixels]), views=1,
    )  # fmt: skip
    return two_views(pixels, draws, plain)[:, 0]
