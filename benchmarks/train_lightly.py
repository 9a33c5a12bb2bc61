"""The peer of benchmarks/train.py: a training loop of lightly's components, put together as its examples do.

Transform, data set wrapper and loss are lightly's; encoder, projector, initial weights, optimizer and learning rates
are ours, so that both sides train the same thing. Run as a program, once for each rank:

    python train_lightly.py '{"...": ...}'    # fields of `Task`; rank 0 prints a JSON object of `Trained`

Where lightly's examples leave a choice, the faster one is taken: images wait in memory, still encoded, where its data
set class would read one file each; loader workers live on from epoch to epoch; batch norm is local, since torch's
global one does not run on CPUs.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from simclr_ray.configure import load_config
from simclr_ray.data.manifest import read_manifest
from simclr_ray.data.plan import Piece
from simclr_ray.data.read import read_rows
from simclr_ray.learn.optim import learning_rate_at, make_optimizer, set_learning_rate
from simclr_ray.train.build import build_model
from simclr_ray.train.derive import derive, policy_of
from simclr_ray.views.policy import Policy

EXIT_NOT_INSTALLED = 3


@dataclass(frozen=True)
class Task:
    """What one rank does."""

    recipe: str
    overrides: list[str]
    rank: int
    ranks: int
    threads: int
    """For the encoder and the loss, of each rank."""
    loaders: int
    """Worker processes of each rank's DataLoader."""
    channels_last: bool
    """Not in lightly's examples."""
    folder: str
    """Where the ranks meet."""
    keep: str | None = None
    """File for the trained encoder and projector (safetensors); None keeps nothing."""
    one_batch: bool = False
    """Both views go through the encoder as one batch, whose statistics batch norm takes, as in SimCLR's own code and
    ours; lightly's examples send one after the other."""


@dataclass(frozen=True)
class Trained:
    """What rank 0 has seen."""

    version: str
    step_s: list[float]
    wait_s: list[float]
    losses: list[float]


class Encoded(Dataset[tuple[Any, int]]):
    """Encoded images in memory; `transform` is set by lightly's wrapper."""

    transform: Callable[[Image.Image], Any]

    def __init__(self, images: list[bytes], background: tuple[int, int, int]) -> None:
        self._images, self._background = images, background

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(io.BytesIO(self._images[index])) as image:
            return self.transform(self._opaque(image)), 0

    def _opaque(self, image: Image.Image) -> Image.Image:
        """As ours has it: what shines through is the background, and not the colours hidden below."""
        if not image.has_transparency_data:
            return image.convert("RGB")
        canvas = Image.new("RGBA", image.size, (*self._background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def installed() -> str | None:
    """Version, or None."""
    try:
        return version("lightly")
    except PackageNotFoundError:
        return None


def train(task: Task) -> Trained:
    os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")  # older releases ask a server whether they are current
    try:
        from lightly.data import LightlyDataset
        from lightly.loss import NTXentLoss
        from lightly.transforms import SimCLRTransform
    except ImportError as error:
        print(f"not installed ({error})", file=sys.stderr)
        raise SystemExit(EXIT_NOT_INSTALLED) from error
    torch.set_num_threads(task.threads)
    if task.ranks > 1:
        store = f"file://{task.folder}/rendezvous"
        dist.init_process_group(
            "gloo", init_method=store, rank=task.rank, world_size=task.ranks, timeout=timedelta(minutes=2)
        )
    config = load_config(task.recipe, task.overrides)
    manifest = read_manifest(str(config.data.train))
    derived, policy = derive(config, manifest), policy_of(config.views)
    images = LightlyDataset.from_torch_dataset(
        Encoded(encoded_images(manifest), config.data.background), transform=SimCLRTransform(**_transform(policy))
    )
    torch.manual_seed(config.run.seed + task.rank)
    loader = DataLoader(
        images,
        batch_size=config.train.global_batch // task.ranks,
        shuffle=task.ranks == 1,
        sampler=DistributedSampler(images) if task.ranks > 1 else None,
        drop_last=True,
        num_workers=task.loaders,
        persistent_workers=task.loaders > 0,
    )
    model = build_model(config)
    if task.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.train()
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if task.ranks > 1 else model
    optimizer = make_optimizer(
        config.optim.name, model, weight_decay=config.optim.weight_decay, momentum=config.optim.momentum
    )
    criterion = NTXentLoss(temperature=config.loss.temperature, gather_distributed=task.ranks > 1)
    batches = _endless(loader)
    step_s, wait_s, losses = [], [], []
    for step in range(derived.total_steps):
        started = time.perf_counter()
        view_a, view_b = next(batches)
        wait_s.append(time.perf_counter() - started)
        if task.channels_last:
            view_a, view_b = (view.contiguous(memory_format=torch.channels_last) for view in (view_a, view_b))
        set_learning_rate(
            optimizer,
            learning_rate_at(
                step,
                peak=derived.peak_learning_rate,
                warmup_steps=derived.warmup_steps,
                total_steps=derived.total_steps,
                schedule=config.optim.schedule,
            ),
        )
        if task.one_batch:
            loss = criterion(*parallel(torch.cat([view_a, view_b])).chunk(2))
        else:
            loss = criterion(parallel(view_a), parallel(view_b))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        step_s.append(time.perf_counter() - started)
    if task.keep and task.rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, task.keep)
    return Trained(installed() or "", step_s, wait_s, losses)


def encoded_images(manifest: Any) -> list[bytes]:
    """Every image of a data set as it is stored."""
    pieces, first = [], 0
    for shard, entry in enumerate(manifest.shards):
        for group, rows in enumerate(entry.rows_per_group):
            pieces.append(Piece(shard, group, 0, rows, first))
            first += rows
    images: list[bytes] = read_rows(manifest, pieces, [manifest.image_column])[manifest.image_column].to_pylist()
    return images


def _transform(policy: Policy) -> dict[str, Any]:
    """The same policy in lightly's words."""
    assert policy.flavour == "torchvision"
    assert not policy.solarize_probability
    return {
        "input_size": policy.size,
        "min_scale": policy.crop_scale[0],
        "hf_prob": policy.flip_probability,
        "cj_prob": policy.jitter_probability,
        "cj_bright": policy.brightness,
        "cj_contrast": policy.contrast,
        "cj_sat": policy.saturation,
        "cj_hue": policy.hue,
        "random_gray_scale": policy.grayscale_probability,
        "gaussian_blur": policy.blur_probability,
        "sigmas": policy.blur_sigma,
        "normalize": {"mean": policy.mean, "std": policy.std} if policy.mean else None,
    }


def _endless(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for (view_a, view_b), _, _ in loader:
            yield view_a, view_b
        epoch += 1


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    result = train(task)
    if task.rank == 0:
        print(json.dumps(asdict(result)))
    if task.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
