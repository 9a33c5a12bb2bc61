"""The representations that are compared, encoded by this process or by Ray actors.

Views are cut into the same runs of rows either way, each goes to exactly one actor, and the results come back in order:
nothing is padded and nothing counted twice, however many actors there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr_ray.config import Config
from simclr_ray.evaluate.encode import Image, TrainedEncoder, embed, pixels, row_slices
from simclr_ray.model.simclr import SimCLR
from simclr_ray.train.cluster import connected, prints_logged
from simclr_ray.views.apply import normalise
from simclr_ray.views.policy import Policy

Represent = Callable[[Image], Tensor]


@contextlib.contextmanager
def encoders_of(config: Config, untrained: SimCLR, trained: TrainedEncoder) -> Iterator[list[tuple[str, Represent]]]:
    """Raw pixels, random encoder and trained encoder, as functions of views (n, S, S, 3) -> (n, D).

    Raises:
        ClusterError: the actors of `evaluate.workers` cannot be had.
    """
    policy = trained.policy

    def raw(views: Image) -> Tensor:
        return pixels(views, policy)

    models = {"random encoder": untrained.encoder, "trained encoder": trained.model.encoder}
    if config.evaluate.workers is None:
        yield [("raw pixels", raw), *((name, _here(model, policy)) for name, model in models.items())]
        return
    cluster = config.cluster.model_copy(update={"workers": config.evaluate.workers})
    with connected(cluster), prints_logged():
        pool = _Pool(models, policy, config.evaluate.workers)
        yield [("raw pixels", raw), *((name, pool.represent(name)) for name in models)]


def _here(model: nn.Module, policy: Policy) -> Represent:
    return lambda views: embed(model, views, policy)


class _Encoder:
    """One actor: the models on its device."""

    def __init__(self, models: dict[str, nn.Module], policy: Policy) -> None:
        import ray

        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(1)
        self._models = {name: model.eval().to(self._device) for name, model in models.items()}
        self._policy = policy

    def embed(self, name: str, views: Image) -> np.ndarray:
        with torch.inference_mode():
            rows = torch.from_numpy(np.array(views)).to(self._device)
            return self._models[name](normalise(rows, self._policy)).float().cpu().numpy()  # type: ignore[no-any-return]


class _Pool:
    def __init__(self, models: dict[str, nn.Module], policy: Policy, workers: int) -> None:
        import ray

        gpus = ray.cluster_resources().get("GPU", 0) >= workers
        remote: Any = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Encoder)
        shared = ray.put(models)
        self._actors = [remote.remote(shared, policy) for _ in range(workers)]

    def represent(self, name: str) -> Represent:
        """The function of one model."""
        from ray.util import ActorPool

        def call(actor: Any, rows: Image) -> Any:
            return actor.embed.remote(name, rows)

        def run(views: Image) -> Tensor:
            parts = ActorPool(self._actors).map(call, [views[rows] for rows in row_slices(len(views))])
            return torch.cat([torch.from_numpy(np.array(part)) for part in parts])

        return run
