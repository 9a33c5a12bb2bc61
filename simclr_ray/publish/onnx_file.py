"""An encoder as an ONNX graph that takes pixels in [0, 1] and standardises them itself."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr_ray.errors import ConfigError
from simclr_ray.model.simclr import SimCLR
from simclr_ray.views.policy import Policy

OPSET = 18


class FromPixels(nn.Module):
    """Pixels to embeddings, and to projections where asked."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: SimCLR, policy: Policy, *, projector: bool) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.projector = model.projector if projector else None
        self.register_buffer("mean", torch.tensor(policy.mean or (0.0, 0.0, 0.0)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(policy.std or (1.0, 1.0, 1.0)).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(n, 3, S, S) float32 in [0, 1] -> embeddings (n, D), and projections (n, P)."""
        h = self.encoder((images - self.mean) / self.std)
        return (h,) if self.projector is None else (h, self.projector(h))


def to_onnx(network: FromPixels, *, size: int) -> bytes:
    """The graph's file; the number of images is free.

    Raises:
        ConfigError: the extra is not installed.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    names = ["embeddings"] if network.projector is None else ["embeddings", "projections"]
    with tempfile.TemporaryDirectory() as scratch, _calm():
        path = Path(scratch) / "model.onnx"
        torch.onnx.export(
            network, (torch.rand(2, 3, size, size),), str(path), input_names=["images"], output_names=names,
            dynamic_shapes={"images": {0: torch.export.Dim("images")}}, opset_version=OPSET, dynamo=True,
            external_data=False, verbose=False,
        )  # fmt: skip
        return path.read_bytes()


def run_onnx(data: bytes, images: Tensor) -> list[Tensor]:
    """The outputs of onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(one) for one in session.run(None, {"images": images.numpy()})]


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"writing ONNX needs {', '.join(missing)}", fix="install with: pip install 'simclr-ray[export]'"
        )


@contextlib.contextmanager
def _calm():  # type: ignore[no-untyped-def]
    """Without the exporter's own lines on the terminal."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
