"""The verb `import`: public weights become a run folder that `evaluate`, `embed` and `export` take.

Files of `torch.save` are read with `weights_only=True` and in no other way: a file that needs more could run code, and
is refused.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.configure import load_config, to_yaml
from simclr_ray.errors import ConfigError, DataError, StorageError
from simclr_ray.publish.foreign import Foreign, from_pytorch, from_tf2, projector_layers
from simclr_ray.publish.tensor_bundle import open_bundle
from simclr_ray.train import checkpoint as ckpt
from simclr_ray.train.build import build_model
from simclr_ray.train.run import FORMAT, RunFolder, identity, look_at_run
from simclr_ray.version import __version__

Layout = Literal["pytorch", "tf2"]
MaxPool = Literal["torch", "tensorflow"]
STATUS = "imported"


@dataclass(frozen=True)
class ImportReport:
    """What was imported."""

    folder: str
    encoder: str
    """Such as `resnet50 1x, stem imagenet-same`."""
    projector: bool
    left_out: tuple[str, ...]
    """Names of what was not taken, such as a classifier's."""


def import_weights(
    file: str, run_folder: str, *, layout: Layout, size: int | None = None,
    flavour: Literal["torchvision", "paper"] | None = None, max_pool: MaxPool | None = None,
) -> ImportReport:  # fmt: skip
    """Make a run folder of weights that another project published.

    Args:
        file: `pytorch`: a file of torch.save or safetensors. `tf2`: a checkpoint's .index file, or an .npz.
        run_folder: Empty or absent.
        layout: The names of the file, see `foreign`.
        size: Side of the images the encoder is for; None: 224, or 32 with the small stem.
        flavour: How images are prepared. None: `paper` for `tf2` (no standardisation), else `torchvision`.
        max_pool: Whose padding the weights were trained with; None: the layout's. Weights that were converted from
            Google's need `tensorflow` in PyTorch's layout too.

    Raises:
        ConfigError: the folder holds something.
        DataError: the file is not of this layout, would need code to be run, or has an encoder that we have not.
        StorageError: a store fails.
    """
    run = look_at_run(run_folder)
    if run.info() is not None:
        raise ConfigError("a run is here already", where=run.uri, fix="choose another folder, or delete this one")
    uri = storage.normalise(file)
    found = _pytorch(uri) if layout == "pytorch" else _tf2(uri)
    config = _config(run, found, layout, size, flavour, max_pool)
    model = build_model(config)
    try:
        model.encoder.load_state_dict(found.encoder, strict=True)
        if found.projector is not None:
            model.projector.load_state_dict(found.projector, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise DataError(f"the weights do not fit {found.name}: {' '.join(lines)}", where=uri) from None
    _write(run, config, ckpt.model_tensors(model), projector=found.projector is not None)
    name = f"{found.name} {found.width}x, stem {config.model.stem}"
    return ImportReport(run.uri, name, found.projector is not None, found.left_out)


def _pytorch(uri: str) -> Foreign:
    data = _bytes(uri)
    if data[8:9] == b"{":
        try:
            return from_pytorch(load_safetensors(data), uri)
        except SafetensorError as error:
            raise DataError(f"not a whole safetensors file: {error}", where=uri) from None
    try:
        stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, ValueError, KeyError, IndexError) as error:
        said = str(error).strip().splitlines()
        raise DataError(
            "not a file of tensors alone", where=uri, got=ascii(said[0] if said else type(error).__name__)[1:-1],
            fix="a file that needs code to be run is never loaded; save its state_dict alone, or as safetensors",
        ) from None  # fmt: skip
    return from_pytorch(_tensors(stored, uri), uri)


def _tensors(stored: Any, uri: str) -> dict[str, Tensor]:
    """The state dict in a file, which may lie inside of an entry."""
    for _ in range(3):
        if isinstance(stored, Mapping):
            tensors = {str(name): value for name, value in stored.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
            stored = next((stored[name] for name in ("state_dict", "model", "resnet") if name in stored), None)
    raise DataError("no state dict in this file", where=uri, expected="tensors by name, or an entry state_dict")


def _tf2(uri: str) -> Foreign:
    if uri.endswith(".index"):
        bundle = open_bundle(uri)
        return from_tf2(bundle.names(), bundle.read, uri)
    try:
        arrays = np.load(io.BytesIO(_bytes(uri)), allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("one array")
        return from_tf2(arrays.files, lambda name: arrays[name].astype(np.float32), uri)
    except (ValueError, OSError, BadZipFile) as error:
        raise DataError(f"not an .npz of arrays: {error}", where=uri,
                        expected="a checkpoint's .index file, or an .npz") from None  # fmt: skip


def _bytes(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        raise StorageError("no file here", where=uri) from None


def _config(
    run: RunFolder, found: Foreign, layout: Layout, size: int | None, flavour: str | None, max_pool: MaxPool | None
) -> Config:
    same = (max_pool or ("tensorflow" if layout == "tf2" else "torch")) == "tensorflow"
    stem = "imagenet-same" if same and found.stem == "imagenet" else found.stem
    small = found.stem == "cifar"
    layers = list(projector_layers(found.projector)) if found.projector is not None else []
    projector = {"projector_layers": len(layers), "projection_dim": layers[-1][1]} if layers else {}
    if len(layers) > 1:
        projector["projector_hidden"] = layers[0][1]
    return load_config({
        "run": {"folder": run.uri},
        "views": {
            "preset": "cifar" if small else "imagenet",
            "size": size or (32 if small else 224),
            "flavour": flavour or ("paper" if layout == "tf2" else "torchvision"),
        },
        "model": {"encoder": found.name, "width": found.width, "stem": stem, **projector},
    })  # fmt: skip


def _write(run: RunFolder, config: Config, tensors: Mapping[str, Tensor], *, projector: bool) -> None:
    """The run folder; `run.json`, by which it is recognised, last."""
    storage.write_bytes(run.path("resolved.yaml"), to_yaml(config.model_dump(mode="json")).encode())
    ckpt.save(run.checkpoints, ckpt.Checkpoint(0, dict(tensors), {}, {"manifest": STATUS, "attempt": 0}))
    run.update(
        format=FORMAT, version=__version__, created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), attempts=0,
        status=STATUS, projector="imported" if projector else "none", identity=identity(config, STATUS),
    )  # fmt: skip
