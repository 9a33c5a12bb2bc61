"""The verb `export`: an encoder as other programs load it, with a card that says what it is.

```
model.safetensors | encoder.safetensors | model.onnx    weights, see `layouts`
projector.safetensors                                   where asked for (in ONNX: a second output)
config.json    architecture and preprocessing
README.md      the card
SHA256SUMS     written last: a folder that has it is complete; `sha256sum -c` checks it
```

Whatever the format, the export is loaded again as its reader would, and its outputs are compared with the run's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.errors import ConfigError, DataError, NumericsError
from simclr_ray.evaluate.encode import TrainedEncoder, load_encoder
from simclr_ray.publish.card import Facts, model_card
from simclr_ray.publish.evaluated import ResultTable, read_evaluated, result_tables
from simclr_ray.publish.layouts import WEIGHTS, Format, plain_model, refuse_what_has_no_name
from simclr_ray.train.run import RunFolder, open_existing
from simclr_ray.version import __version__
from simclr_ray.views.policy import Policy

BEGUN_NAME, SUMS_NAME = "_begun.json", "SHA256SUMS"
PLAIN_TOLERANCE = 1e-6
"""Largest difference of a plain library's outputs, relative to the largest output."""
ONNX_TOLERANCE = 1e-4
"""Of onnxruntime's, whose convolutions sum in another order."""
_CHECK_IMAGES = 4


@dataclass(frozen=True)
class ExportReport:
    """What an export left behind."""

    folder: str
    files: tuple[str, ...]
    difference: float
    """Largest difference of outputs to the run's encoder, relative to the largest output."""


def export(
    run: str, folder: str, *, format: Format = "safetensors", step: int | None = None, projector: bool = False,
    licence: str = "unknown",
) -> ExportReport:  # fmt: skip
    """Write an encoder for other programs.

    Args:
        run: The run folder.
        folder: Empty or absent, or one in which an export was begun.
        format: `safetensors`, state dicts that plain `torchvision` or `timm` load with strict=True, or `onnx`.
        step: Checkpoint; None takes the newest.
        projector: Also the projector (`safetensors` and `onnx`).
        licence: SPDX identifier of the weights' licence.

    Raises:
        ConfigError: no run here, the folder is not empty, or the format has no such network.
        StorageError: the run has no valid checkpoint, or a store fails.
        DataError: what was measured of the run cannot be read.
        NumericsError: the exported network gives other outputs.
    """
    place, config = open_existing(run)
    trained = load_encoder(run, step)
    refuse_what_has_no_name(config.model, format, size=trained.policy.size)
    if projector and format not in ("safetensors", "onnx"):
        raise ConfigError(f"{format} has no projector", where="projector", fix="use --format safetensors or onnx")
    if projector and _info(place).get("projector") == "none":
        raise ConfigError("the imported weights came without a projector", where=place.uri)
    folder = storage.normalise(folder)
    _claim(folder)
    if format == "onnx":
        files, difference, checked = _as_onnx(trained, projector=projector)
    else:
        files, difference, checked = _as_state_dict(config, trained, format, projector=projector)
    files["config.json"] = json.dumps(_configuration(config, trained, format), indent=1).encode()
    facts = Facts(
        config, trained.policy, format, trained.step, trained.width, licence, str(_identity(place).get("manifest")),
        checked, _measured(place),
        {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    )  # fmt: skip
    files["README.md"] = model_card(facts).encode()
    _write(folder, files)
    return ExportReport(folder, (*files, SUMS_NAME), difference)


def _as_state_dict(
    config: Config, trained: TrainedEncoder, format_: Format, *, projector: bool
) -> tuple[dict[str, bytes], float, str]:
    encoder = trained.model.encoder
    files = {WEIGHTS[format_]: _safetensors(encoder)}
    if projector:
        files["projector.safetensors"] = _safetensors(trained.model.projector)
    again = load_tensors(files[WEIGHTS[format_]])
    if format_ == "safetensors":
        from simclr_ray.model.encoder import make_encoder

        plain: nn.Module = make_encoder(config.model.encoder, width=config.model.width, stem=config.model.stem)
    else:
        plain = plain_model(config.model, format_)
    plain.load_state_dict(again, strict=True)
    images = _check_images(trained.policy)
    with torch.inference_mode():
        difference = _difference(plain.eval()(images), encoder(images))
    _refuse(difference, PLAIN_TOLERANCE, format_)
    name = "This project" if format_ == "safetensors" else format_
    return files, difference, (
        f"{name} loaded these weights with `strict=True` when they were exported; its outputs differ from the run's by "
        f"{difference:.1e} of the largest at most."
    )  # fmt: skip


def _as_onnx(trained: TrainedEncoder, *, projector: bool) -> tuple[dict[str, bytes], float, str]:
    from simclr_ray.publish.onnx_file import FromPixels, run_onnx, to_onnx

    network = FromPixels(trained.model, trained.policy, projector=projector).eval()
    data = to_onnx(network, size=trained.policy.size)
    images = torch.rand(_CHECK_IMAGES, 3, trained.policy.size, trained.policy.size)
    with torch.inference_mode():
        expected = network(images)
    found = run_onnx(data, images)
    difference = max(_difference(one, other) for one, other in zip(found, expected, strict=True))
    _refuse(difference, ONNX_TOLERANCE, "onnx")
    return {"model.onnx": data}, difference, (
        "onnxruntime ran this graph when it was exported; its outputs differ from the run's by "
        f"{difference:.1e} of the largest at most. Outputs: `embeddings`{', `projections`' if projector else ''}."
    )  # fmt: skip


def _check_images(policy: Policy) -> Tensor:
    """Random inputs of the encoder's size; the caller's random state is left alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_CHECK_IMAGES, 3, policy.size, policy.size, generator=generator)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _refuse(difference: float, tolerance: float, format_: str) -> None:
    if not difference <= tolerance:
        raise NumericsError(
            f"the encoder as {format_} has other outputs than the run's", got=f"{difference:.1e} of the largest",
            expected=f"at most {tolerance:g}",
        )  # fmt: skip


def _safetensors(module: nn.Module) -> bytes:
    return bytes(save_tensors({name: value.contiguous() for name, value in module.state_dict().items()}))


def _configuration(config: Config, trained: TrainedEncoder, format_: Format) -> dict[str, Any]:
    """`config.json`: for `timm` as timm reads it (`create_model("local-dir:FOLDER")`), for all what we need."""
    policy, model = trained.policy, config.model
    ours = {
        "simclr_ray": __version__,
        "format": format_,
        "step": trained.step,
        "model": model.model_dump(mode="json"),
        "input": policy.model_dump(mode="json", include={
            "size", "central_fraction", "interpolation", "flavour", "mean", "std",
        }),
    }  # fmt: skip
    if format_ != "timm":
        return ours
    return {
        "architecture": model.encoder,
        "num_classes": 0,
        "num_features": trained.width,
        "pretrained_cfg": {
            "input_size": [3, policy.size, policy.size],
            "interpolation": policy.interpolation,
            "crop_pct": policy.central_fraction,
            "mean": list(policy.mean or (0.0, 0.0, 0.0)),
            "std": list(policy.std or (1.0, 1.0, 1.0)),
            "num_classes": 0,
            "first_conv": "conv1",
            "classifier": "fc",
        },
        **ours,
    }


def _info(run: RunFolder) -> dict[str, Any]:
    return run.info() or {}


def _identity(run: RunFolder) -> dict[str, Any]:
    return dict(_info(run).get("identity", {}))


def _measured(run: RunFolder) -> list[ResultTable]:
    """What `evaluate` left, for the card.

    Raises:
        DataError: a file of it cannot be read, so that the card would say too little.
    """
    notes: list[str] = []
    found = read_evaluated(run, notes)
    if notes:
        raise DataError("the card cannot tell what was measured", where=run.path("eval"), got="; ".join(notes),
                        fix="run simclr-ray evaluate again, or remove that file")  # fmt: skip
    return result_tables(found)


def _claim(folder: str) -> None:
    """Take an empty folder, or one in which an export was begun."""
    names = storage.list_names(folder)
    if SUMS_NAME in names:
        raise ConfigError("an export is here already", where=folder, fix="choose another folder, or delete this one")
    if names and BEGUN_NAME not in names:
        raise ConfigError(
            "the folder is not empty", where=folder, got=", ".join(names[:3]),
            fix="choose another folder, or delete this one",
        )  # fmt: skip
    storage.write_bytes(storage.join(folder, BEGUN_NAME), b"{}")


def _write(folder: str, files: dict[str, bytes]) -> None:
    """All files, then their checksums: the mark of a complete export."""
    for name in storage.list_names(folder):
        if name != BEGUN_NAME and name not in files:
            storage.delete_file(storage.join(folder, name))  # of an export in another format that was begun
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    storage.write_bytes(storage.join(folder, SUMS_NAME), sums.encode())
    storage.delete_file(storage.join(folder, BEGUN_NAME))
