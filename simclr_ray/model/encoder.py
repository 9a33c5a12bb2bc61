"""The encoder f: image -> embedding h, a ResNet as SimCLR uses it.

Parameter names are those of timm's and torchvision's ResNet, so that weights can be used there without renaming.
Width means what SimCLR means by it (arXiv 2002.05709, figure 7): *all* channel counts times 1, 2 or 4, the stem's and
the embedding's too. timm's `wide_resnet50_2` is something else: it widens only the inner convolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

EncoderName = Literal["small", "resnet18", "resnet50"]
Width = Literal[1, 2, 4]
Stem = Literal["imagenet", "cifar", "imagenet-same"]


@dataclass(frozen=True, slots=True)
class _Architecture:
    """Channel counts at width 1. `channels` and `blocks` are per stage, three stages or four."""

    block: type[nn.Module]
    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    stem_channels: int
    imagenet_kernel: int
    imagenet_pool: bool


_ARCHITECTURES: dict[EncoderName, _Architecture] = {
    # For 28 to 32 pixel images on a CPU: 0.31 M parameters. Images this small are not pooled.
    "small": _Architecture(BasicBlock, (1, 1, 1), (32, 64, 128), 32, imagenet_kernel=3, imagenet_pool=False),
    "resnet18": _Architecture(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), 64, imagenet_kernel=7, imagenet_pool=True),
    "resnet50": _Architecture(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), 64, imagenet_kernel=7, imagenet_pool=True),
}


def make_encoder(
    name: EncoderName, *, width: Width = 1, stem: Stem = "imagenet", zero_init_last: bool = True
) -> Encoder:
    """Build an encoder with fresh weights.

    Args:
        name: "resnet18" and "resnet50", or "small": three stages of one block, for a CPU and images of about 32 pixels.
        width: Multiplies every channel count.
        stem: "imagenet": 7x7 convolution with stride 2, then max pooling ("small": 3x3 with stride 2, no pooling).
            "cifar": 3x3 convolution with stride 1, no pooling (SimCLR, appendix B.9). "imagenet-same": max pooling
            that pads as TensorFlow does.
        zero_init_last: Start each residual branch at zero, by the last batch norm's gamma (google-research/simclr,
            tf2/resnet.py, init_zero).
    """
    return Encoder(_ARCHITECTURES[name], width=width, stem=stem, zero_init_last=zero_init_last)


class Encoder(ResNet):  # type: ignore[misc]  # timm ships no types
    """A timm ResNet without classifier. Build it with `make_encoder`."""

    embedding_dim: int
    """Width of the embedding h."""

    def __init__(self, architecture: _Architecture, *, width: int, stem: Stem, zero_init_last: bool) -> None:
        stem_channels = architecture.stem_channels * width
        super().__init__(
            architecture.block,
            architecture.blocks,
            num_classes=0,
            channels=tuple(channels * width for channels in architecture.channels),
            # timm fixes the one-convolution stem at 64 channels. Its deep stem has a free width (it ends in twice
            # stem_width), so ask for that one, which sizes all that follows, and put our convolution in its place.
            stem_type="deep",
            stem_width=stem_channels // 2,
            zero_init_last=zero_init_last,
        )
        self.conv1 = _stem_convolution(architecture, stem_channels, stem)
        pool: nn.Module | None = SamePool() if stem == "imagenet-same" else None
        if stem == "cifar" or not architecture.imagenet_pool:
            pool = nn.Identity()
        if pool is not None:
            self.maxpool = pool
        if len(architecture.channels) == 3:
            self.layer4 = nn.Identity()  # timm's forward names four stages
        self.embedding_dim = self.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings h, (m, embedding_dim): the average-pooled last feature map of images (m, 3, H, W)."""
        return cast(Tensor, super().forward(images))

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Fresh weights; timm's constructor calls this. Replaces timm's fan-out initialisation by SimCLR's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _initialise(module)
            elif isinstance(module, (BasicBlock, Bottleneck)) and zero_init_last:
                module.zero_init_last()


class SamePool(nn.Module):
    """Max pooling of 3x3 with stride 2 and TensorFlow's padding "SAME", as google-research/simclr has it.

    It pads so that ceil(n / 2) outputs come of n: for even n one row below and one column right, and none above and
    left, where torch's padding of 1 pads all four sides and so looks at other windows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, C, ceil(H / 2), ceil(W / 2))."""
        height, width = x.shape[-2:]
        top, left = height % 2, width % 2
        padded = nn.functional.pad(x, (left, 1, top, 1), value=-math.inf)
        return nn.functional.max_pool2d(padded, 3, 2)


def _stem_convolution(architecture: _Architecture, channels: int, stem: Stem) -> nn.Conv2d:
    kernel, stride = (3, 1) if stem == "cifar" else (architecture.imagenet_kernel, 2)
    convolution = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
    _initialise(convolution)
    return convolution


def _initialise(convolution: nn.Conv2d) -> None:
    """google-research/simclr, tf2/resnet.py: VarianceScaling(), that is scale 1, fan in, truncated normal."""
    fan_in = convolution.weight[0].numel()
    # Cutting a normal off at two deviations shrinks its deviation to this part (Keras corrects for it likewise).
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    with torch.no_grad():
        nn.init.trunc_normal_(convolution.weight, std=std, a=-2 * std, b=2 * std)
