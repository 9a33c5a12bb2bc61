"""Images a second of the colours on a CUDA device, and of a whole ResNet-50 step in bf16 that takes them with it.

Says what `views.where: gpu` costs the device, and whether the copy and the colours hide behind the step as
`train/device.py` means them to. Needs a GPU, no Ray and no image files: colours cost the same whatever is in a picture.

    python benchmarks/views_gpu.py [--images 256] [--size 224] [--encoder resnet50] [--steps 30]

With `--device cpu` and small numbers it shows that it runs; what it prints then is no figure, and nothing is written.

Parts, each a median over the steps after a warm-up, in one run:

draws            the parameters of the views, made on the host
colours          crops on the device to finished views, parameters included
copy             finished views from the host's memory to the device, pinning included
step alone       encoder, projector, NT-Xent, LARS on views that lie on the device already
step + copy      the same with each batch brought from the host one step ahead (`views.where: cpu`)
step + colours   the same with crops brought and coloured one step ahead (`views.where: gpu`)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from simclr_ray.learn.nt_xent import NTXent, distributed_nt_xent
from simclr_ray.learn.optim import make_optimizer
from simclr_ray.model.encoder import make_encoder
from simclr_ray.model.projector import make_projector
from simclr_ray.model.simclr import SimCLR
from simclr_ray.train.ahead import OneAhead, Ready
from simclr_ray.train.batches import StepBatch
from simclr_ray.train.device import ViewsOnDevice, finish_colours
from simclr_ray.train.step import autocast_of, encoder_input, train_step
from simclr_ray.views.policy import Policy, preset
from simclr_ray.views.stage import draws_at

FILE = Path(__file__).parent / "results/views_gpu.json"
SEED, TEMPERATURE, WARM_UP = 0, 0.1, 5
MEMORY = 8
"""Different batches of the host, used in turn: one alone would stay in the processor's cache."""


def batches(count: int, images: int, size: int) -> list[StepBatch]:
    """Crops as a stream would hand them out, of noise."""
    made = np.random.default_rng(SEED)
    return [
        StepBatch(
            step=step,
            views=torch.from_numpy(made.integers(0, 256, (images, 2, size, size, 3), dtype=np.uint8)),
            sample_ids=np.arange(step * images, (step + 1) * images),
            epochs=np.zeros(images, np.int64),
            uses=np.zeros(images, np.int64),
            micro_batches=(images,),
            images_by_rank=(images,),
            rejected=(),
            animated=0,
            wait_s=0.0,
        )
        for step in range(count)
    ]


class Timer:
    """Seconds of work, with the device's included."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self._device, self._steps = device, steps

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def each(self, work: Callable[[int], object]) -> float:
        """Median of calls that wait for the device each."""
        times = []
        for call in range(WARM_UP + self._steps):
            self.wait()
            started = time.perf_counter()
            work(call)
            self.wait()
            times.append(time.perf_counter() - started)
        return median(times[WARM_UP:])

    def in_a_row(self, work: Iterator[object]) -> float:
        """Median of what comes one after another, and may overlap: seconds from one to the next."""
        times = []
        for _ in range(WARM_UP + self._steps):
            next(work)
            times.append(time.perf_counter())
        self.wait()
        return median(np.diff(times[WARM_UP - 1 :]).tolist())


def trained(
    args: argparse.Namespace, device: torch.device, policy: Policy
) -> Callable[[Tensor, Callable[[], None]], object]:
    """A function that does one step on finished views (n, 2, S, S, 3) of the device."""
    encoder = make_encoder(args.encoder, width=1, stem="imagenet", zero_init_last=True)
    projector = make_projector(encoder.embedding_dim, layers=2, hidden_dim=None, output_dim=128)
    model: nn.Module = SimCLR(encoder, projector).to(device).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer("lars", model, weight_decay=1e-6, momentum=0.9)
    autocast = autocast_of("bf16", device)

    def encode(views: Tensor) -> Tensor:
        with autocast():
            projections: Tensor = model(encoder_input(views, policy, channels_last=True))
            return projections

    loss_of: Callable[[Tensor], NTXent] = partial(distributed_nt_xent, temperature=TEMPERATURE)

    def step(views: Tensor, meanwhile: Callable[[], None]) -> object:
        return train_step(
            model, optimizer, [views], encode=encode, loss_of=loss_of, learning_rate=0.1, clip_gradient_norm=None,
            meanwhile=meanwhile,
        )  # fmt: skip

    return step


def ahead_of_steps(
    made: list[StepBatch], views: ViewsOnDevice, step: Callable[[Tensor, Callable[[], None]], object]
) -> Iterator[object]:
    """Steps as the train worker does them, each on a batch that was brought during the one before."""

    def endless() -> Iterator[StepBatch]:
        while True:
            yield from made

    ahead = OneAhead(endless(), views.bring)
    ready: Ready
    for ready in ahead:
        yield step(ready.arrived(), ahead.fetch)


def measured(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part for `args.images` images."""
    policy, timer = preset("imagenet", size=args.size), Timer(device, args.steps)
    made = batches(MEMORY, args.images, args.size)
    there = [batch.views.to(device) for batch in made[:2]]
    sizes = np.full((args.images, 2), args.size)

    def draws(call: int) -> object:
        batch = made[call % MEMORY]
        return draws_at(policy, seed=SEED, epoch=batch.epochs, sample_ids=batch.sample_ids, sizes=sizes, use=batch.uses)

    seconds = {
        "draws": timer.each(draws),
        "colours": timer.each(lambda call: finish_colours(there[call % 2], made[call % MEMORY], policy, seed=SEED)),
        "copy": timer.each(
            lambda call: ViewsOnDevice(device, policy, seed=SEED, where="cpu").bring(made[call % MEMORY])()
        ),
    }
    step = trained(args, device, policy)
    seconds["step alone"] = timer.each(lambda call: step(there[call % 2], lambda: None))
    for name, where in (("step + copy", "cpu"), ("step + colours", "gpu")):
        views = ViewsOnDevice(device, policy, seed=SEED, where=where)  # type: ignore[arg-type]
        seconds[name] = timer.in_a_row(ahead_of_steps(made, views, step))
    return {name: 1000 * value for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="of a step; each gives two views")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    parts = measured(args, device)
    print(f"{'':16}{'ms':>10}{'images/s':>12}{'of the step alone':>20}")
    for name, ms in parts.items():
        print(f"{name:16}{ms:10.2f}{1000 * args.images / ms:12.0f}{ms / parts['step alone']:20.2f}")
    if device.type != "cuda":
        print("not a GPU: nothing is written")
        return
    facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
    settings = {name: getattr(args, name) for name in ("images", "size", "encoder", "steps")} | {"precision": "bf16"}
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    result = {"machine": facts, "settings": settings, "ms": parts, "peak_GB": peak}
    FILE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
