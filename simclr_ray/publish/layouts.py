"""State dicts as plain libraries name them, and the lines of code that load them there.

The encoder is a timm ResNet whose names are also torchvision's, so nothing is renamed. What these libraries can build
from a name alone decides what can be exported to them: ResNet-18 and -50 of width 1. The stem of `cifar` and the max
pooling of `imagenet-same` have no weights of other names; a line or two puts them in place. `small` and widths 2 and 4
exist in no library: they go out as safetensors, to be loaded by this project, or as ONNX, which needs no library.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from simclr_ray.config import ModelConfig
from simclr_ray.errors import ConfigError

Format = Literal["safetensors", "torchvision", "timm", "onnx"]
WEIGHTS: dict[Format, str] = {
    "safetensors": "encoder.safetensors",
    "torchvision": "model.safetensors",
    "timm": "model.safetensors",
    "onnx": "model.onnx",
}


def refuse_what_has_no_name(model: ModelConfig, format_: Format, *, size: int) -> None:
    """Raise where a plain library has no such network.

    Raises:
        ConfigError: what cannot be exported, and what can.
    """
    if format_ not in ("torchvision", "timm"):
        return
    fix = "use --format safetensors, which this project loads, or --format onnx"
    if model.encoder == "small":
        raise ConfigError(f"{format_} has no encoder like `small`", where="model.encoder", fix=fix)
    if model.width != 1:
        raise ConfigError(
            f"{format_} has no {model.encoder} of which all channels are {model.width} times as many (its `wide_` "
            "networks widen the inner convolutions alone)", where="model.width", got=model.width, fix=fix,
        )  # fmt: skip
    if model.stem == "imagenet-same" and ((size + 1) // 2) % 2:
        raise ConfigError(
            f"for images of {size} pixels {format_} cannot pad as TensorFlow does by a line of code",
            where="model.stem", got=model.stem, fix=fix,
        )  # fmt: skip


def loading_code(model: ModelConfig, format_: Format) -> str:
    """Python that loads an export in its folder, as `model` in evaluation mode (of ONNX: as `session`)."""
    if format_ == "onnx":
        return 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")'
    weights = f'model.load_state_dict(load_file("{WEIGHTS[format_]}"), strict=True)'
    if format_ == "safetensors":
        build = f'model = make_encoder("{model.encoder}", width={model.width}, stem="{model.stem}")'
        imports = ["from safetensors.torch import load_file", "from simclr_ray.model.encoder import make_encoder"]
        return "\n".join([*imports, "", build, weights, "model.eval()"])
    if format_ == "torchvision":
        imports = ["import torch", "import torchvision", "from safetensors.torch import load_file"]
        lines = [f"model = torchvision.models.{model.encoder}()", "model.fc = torch.nn.Identity()"]
    else:
        imports = ["import timm", "import torch", "from safetensors.torch import load_file"]
        lines = [f'model = timm.create_model("{model.encoder}", num_classes=0)']
    return "\n".join([*imports, "", *lines, *_stem_lines(model), weights, "model.eval()"])


def plain_model(model: ModelConfig, format_: Format) -> nn.Module:
    """The network as the plain library builds it, with fresh weights; the same as `loading_code` says."""
    if format_ == "torchvision":
        import torchvision

        network: nn.Module = getattr(torchvision.models, model.encoder)()
        network.fc = nn.Identity()
    else:
        import timm

        network = timm.create_model(model.encoder, num_classes=0)
    if model.stem == "cifar":
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    if model.stem == "imagenet-same":
        network.maxpool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))
    return network


def _stem_lines(model: ModelConfig) -> list[str]:
    match model.stem:
        case "cifar":
            return ["model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)", "model.maxpool = torch.nn.Identity()"]
        case "imagenet-same":  # after a ReLU, padding with zeros is padding with minus infinity
            pool = "torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), torch.nn.MaxPool2d(3, 2))"
            return [f"model.maxpool = {pool}"]
    return []
