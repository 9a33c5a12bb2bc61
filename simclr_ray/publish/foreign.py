"""Weights of other projects, by the names they have there, as this project's encoder and projector.

`pytorch`: torchvision's ResNet names, plain or under a prefix (`module.`, `encoder.`, `backbone.`, ...), in a file of
`torch.save` or safetensors, perhaps inside an entry `state_dict` or `model`. Most PyTorch ports of SimCLR have this,
among them the converted weights of the paper (tonylins/simclr-converter: `{"state_dict": ...}`).

`tf2`: the object names of google-research/simclr's tf2/resnet.py and tf2/model.py, as `tf.train.Checkpoint(model=...)`
writes them: `model/resnet_model/block_groups/0/layers/1/conv_relu_dropblock_layers/3/conv2d/kernel`. A checkpoint's
`.index` file, or an `.npz` of arrays by these names.

Strided convolutions of Google's code pad by hand, (k - 1) / 2 on both sides for the odd kernels there are, which is
torch's padding; only max pooling pads otherwise (`model.stem: imagenet-same`). Selective kernels and ResNet-D have no
counterpart here and are refused; neither has Google's ResNet-18, whose first block projects its shortcut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from simclr_ray.errors import DataError

EncoderName = Literal["resnet18", "resnet50"]
StemName = Literal["imagenet", "cifar"]
Tensors = dict[str, Tensor]

_WRAPPERS = (
    "module.",
    "model.",
    "encoder.",
    "encoder_q.",
    "backbone.",
    "net.",
    "convnet.",
    "resnet.",
    "online_encoder.",
)
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_BLOCKS: dict[EncoderName, tuple[int, ...]] = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
_BN = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


@dataclass(frozen=True)
class Foreign:
    """Weights that were recognised."""

    encoder: Tensors
    """By this project's names."""
    projector: Tensors | None
    name: EncoderName
    width: Literal[1, 2, 4]
    stem: StemName
    left_out: tuple[str, ...]
    """Names of what was not taken, such as a classifier's."""


def from_pytorch(tensors: Mapping[str, Tensor], where: str) -> Foreign:
    """Recognise torchvision's names.

    Raises:
        DataError: there is no such encoder, or a part of it is missing.
    """
    prefix = _prefix(tensors, where)
    mine = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    body = {name: value for name, value in mine.items() if re.match(r"(conv1|bn1|layer[1-9]\d*)\.", name)}
    name, width, stem = _recognised(body, where)
    left_out = sorted(set(tensors) - {prefix + one for one in body})
    return Foreign(_counted(body), None, name, width, stem, tuple(left_out))


def from_tf2(names: Sequence[str], read: Callable[[str], np.ndarray], where: str) -> Foreign:
    """Recognise the names of google-research/simclr's TF2 code.

    Args:
        names: Of all floating-point variables.
        read: Gives one.
        where: For messages.

    Raises:
        DataError: there is no such encoder, a part of it is missing, or it has selective kernels.
    """
    plain = {name.removesuffix(_SUFFIX): name for name in names if "OPTIMIZER_SLOT" not in name}
    roots = {one[: one.index("resnet_model/")] for one in plain if "resnet_model/" in one}
    if len(roots) != 1:
        raise DataError("no encoder of google-research/simclr's TF2 code", where=where, got=_some(plain),
                        expected="variables named .../resnet_model/...")  # fmt: skip
    root = roots.pop()
    body = root + "resnet_model/"
    if f"{body}initial_conv_relu_max_pool/1/bn/gamma" in plain or any("conv2d_fixed_padding" in one for one in plain):
        raise DataError("the encoder has selective kernels or ResNet-D's stem, which this project has not", where=where,
                        fix="use weights of sk_ratio 0")  # fmt: skip
    encoder, unknown = Tensors(), list[str]()
    for one, stored in plain.items():
        if one.startswith(body):
            renamed = _tf2_name(one.removeprefix(body))
            if renamed is None:
                unknown.append(one)
            else:
                encoder[renamed] = _as_torch(read(stored), renamed)
    if unknown:
        raise DataError("parts of the encoder are not known", where=where, got=_some(unknown))
    if "layer1.0.downsample.0.weight" in encoder and "layer1.0.conv3.weight" not in encoder:
        raise DataError(
            "ResNet-18 of Google's code has a projection in its first block, torchvision's and ours have none",
            where=where, expected="ResNet-50",
        )  # fmt: skip
    head = f"{root}_projection_head/"
    projector = _tf2_projector(
        {one.removeprefix(head): read(plain[one]) for one in plain if one.startswith(head)}, where
    )
    name, width, stem = _recognised(encoder, where)
    left_out = [one for one in plain if not one.startswith((body, head))]
    return Foreign(_counted(encoder), projector, name, width, stem, tuple(sorted(left_out)))


def _prefix(tensors: Mapping[str, Tensor], where: str) -> str:
    """What stands before `conv1.weight`."""
    found = [name.removesuffix("conv1.weight") for name in tensors if name.endswith("conv1.weight")]
    known = [one for one in found if _is_wrapper(one)]
    if len(known) != 1:
        raise DataError("no ResNet by torchvision's names, or several", where=where, got=_some(tensors),
                        expected="one conv1.weight, alone or under a prefix such as backbone.")  # fmt: skip
    return known[0]


def _is_wrapper(prefix: str) -> bool:
    while prefix:
        wrapper = next((one for one in _WRAPPERS if prefix.startswith(one)), None)
        if wrapper is None:
            return False
        prefix = prefix.removeprefix(wrapper)
    return True


def _recognised(body: Mapping[str, Tensor], where: str) -> tuple[EncoderName, Literal[1, 2, 4], StemName]:
    """Which of our encoders it is; that nothing is missing or of another shape, `load_state_dict` checks."""
    blocks = tuple(
        len({name.split(".")[1] for name in body if name.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in body
    names = [name for name, wanted in _BLOCKS.items() if wanted == blocks and (name == "resnet50") == bottleneck]
    stem = body["conv1.weight"].shape if "conv1.weight" in body else (0, 0, 0, 0)
    width = stem[0] // 64
    if not names or width not in (1, 2, 4) or stem[0] % 64 or stem[2] not in (3, 7):
        raise DataError(
            "an encoder that this project has not", where=where,
            got=f"blocks {blocks}{' with three convolutions' if bottleneck else ''}, a stem of shape {tuple(stem)}",
            expected="ResNet-18 or -50 of width 1, 2 or 4",
        )  # fmt: skip
    return names[0], width, "cifar" if stem[2] == 3 else "imagenet"  # type: ignore[return-value]


_TF2_STEM = {"0": "conv1", "2": "bn1"}
_TF2_BOTTLENECK = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
"""Positions in `conv_relu_dropblock_layers`; those between are DropBlock, which has no variables."""
_TF2_BASIC = {"0": "conv1", "1": "bn1", "2": "conv2", "3": "bn2"}
_TF2_SHORTCUT = {"0": "downsample.0", "1": "downsample.1"}
_TF2_LISTS = {
    "conv_relu_dropblock_layers": _TF2_BOTTLENECK,
    "conv2d_bn_layers": _TF2_BASIC,
    "projection_layers": _TF2_SHORTCUT,
    "shortcut_layers": _TF2_SHORTCUT,
}


def _tf2_name(name: str) -> str | None:
    """`block_groups/0/layers/1/conv_relu_dropblock_layers/3/conv2d/kernel` as `layer1.1.conv2.weight`."""
    parts = name.split("/")
    match parts:
        case ["initial_conv_relu_max_pool", place, kind, variable]:
            layer, table = "", _TF2_STEM
        case ["block_groups", group, "layers", block, lists, place, kind, variable] if lists in _TF2_LISTS:
            layer, table = f"layer{int(group) + 1}.{int(block)}.", _TF2_LISTS[lists]
        case _:
            return None
    if place not in table:
        return None
    if (kind, variable) == ("conv2d", "kernel"):
        return f"{layer}{table[place]}.weight"
    if kind == "bn" and variable in _BN:
        return f"{layer}{table[place]}.{_BN[variable]}"
    return None


def _as_torch(value: np.ndarray, name: str) -> Tensor:
    """TensorFlow stores kernels as (height, width, in, out)."""
    if value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(value))


def _counted(tensors: Tensors) -> Tensors:
    """With the counts of batches that torch's batch norms keep, where they are missing: TensorFlow has none."""
    counts = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in tensors if name.endswith("running_mean")
    }  # fmt: skip
    return counts | tensors


def _tf2_projector(variables: Mapping[str, np.ndarray], where: str) -> Tensors | None:
    """`linear_layers/J/dense/kernel` and `.../bn_relu/bn/gamma` as our Sequential of dense, batch norm, ReLU."""
    if not variables:
        return None
    numbers = [re.match(r"linear_layers/(\d+)/", name) for name in variables]
    layers = 1 + max((int(one[1]) for one in numbers if one), default=-1)
    if None in numbers or not all(f"linear_layers/{layer}/dense/kernel" in variables for layer in range(layers)):
        raise DataError(
            "the projection head is not one of google-research/simclr's TF2 code", where=where, got=_some(variables),
            expected="linear_layers/0/dense/kernel, linear_layers/1/dense/kernel and so on, none left out",
        )  # fmt: skip
    out = Tensors()
    for layer in range(layers):
        kernel = torch.from_numpy(np.ascontiguousarray(variables[f"linear_layers/{layer}/dense/kernel"].T))
        out[f"{3 * layer}.weight"] = kernel
        norm = {key: variables.get(f"linear_layers/{layer}/bn_relu/bn/{key}") for key in _BN}
        for key, value in norm.items():  # the last layer has no beta
            made = torch.zeros(len(kernel)) if value is None else torch.from_numpy(np.ascontiguousarray(value))
            out[f"{3 * layer + 1}.{_BN[key]}"] = made
    return _counted(out)


def _some(names: Mapping[str, object] | Sequence[str]) -> str:
    shown = sorted(names)[:3]
    return f"{len(names)} names, such as {', '.join(map(ascii, shown))}" if shown else "nothing"


def projector_layers(projector: Mapping[str, Tensor]) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of each dense layer of a projector."""
    for index in sorted(int(name.split(".")[0]) for name, value in projector.items() if value.ndim == 2):
        outputs, inputs = projector[f"{index}.weight"].shape
        yield int(inputs), int(outputs)
