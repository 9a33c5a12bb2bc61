"""Encoders: widths, stems and initialisation as SimCLR has them; weights interchangeable with timm and torchvision."""

import math

import pytest
import torch
import torchvision
from torch import nn

from simclr_ray.model.encoder import Encoder, make_encoder


def on_meta(name: str, **options) -> Encoder:
    with torch.device("meta"):
        return make_encoder(name, **options)


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("width", "paper_millions", "exact"), [(1, 24, 23_508_032), (2, 94, 93_907_072), (4, 375, 375_378_176)]
)
def test_resnet50_has_the_papers_sizes(width, paper_millions, exact):
    # SimCLR, table 1 and figure 1: 24 M, 94 M and 375 M parameters, embeddings of 2048 * width.
    encoder = on_meta("resnet50", width=width)
    assert num_parameters(encoder) == exact
    assert round(exact / 1e6) == paper_millions
    assert encoder.embedding_dim == 2048 * width
    assert encoder(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 2048 * width)


def test_small_is_small():
    encoder = make_encoder("small")
    assert num_parameters(encoder) == 307_360
    assert encoder.embedding_dim == 128
    for side in (28, 32):
        assert encoder(torch.rand(2, 3, side, side)).shape == (2, 128)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50"])
def test_width_multiplies_every_channel_count(name, width):
    narrow, wide = on_meta(name).state_dict(), on_meta(name, width=width).state_dict()
    assert narrow.keys() == wide.keys()
    for key, tensor in narrow.items():
        if tensor.dim() == 4:
            outputs, inputs = tensor.shape[:2]
            expected = (outputs * width, inputs if key == "conv1.weight" else inputs * width, *tensor.shape[2:])
        else:
            expected = tuple(size * width for size in tensor.shape)
        assert wide[key].shape == expected, key


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_weights_load_into_torchvisions_resnet(name):
    encoder = on_meta(name)
    with torch.device("meta"):
        other = getattr(torchvision.models, name)()
    missing, unexpected = other.load_state_dict(encoder.state_dict(), strict=False, assign=True)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert unexpected == []


def test_computes_what_torchvisions_resnet_does():
    # Same strides, paddings and places: SimCLR's ResNet has its stride in the 3x3 convolution, as torchvision's.
    encoder, other = make_encoder("resnet18", zero_init_last=False).eval(), torchvision.models.resnet18().eval()
    other.fc = nn.Identity()
    other.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images), other(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stem", "kernel", "stride", "pool"),
    [
        ("resnet18", "imagenet", 7, 2, nn.MaxPool2d),
        ("resnet50", "imagenet", 7, 2, nn.MaxPool2d),
        ("resnet50", "cifar", 3, 1, nn.Identity),  # SimCLR, appendix B.9: 3x3, stride 1, no max pooling
        ("small", "imagenet", 3, 2, nn.Identity),
        ("small", "cifar", 3, 1, nn.Identity),
    ],
)
def test_stems(name, stem, kernel, stride, pool):
    encoder = on_meta(name, stem=stem)
    assert encoder.conv1.kernel_size == (kernel, kernel)
    assert encoder.conv1.stride == (stride, stride)
    assert encoder.conv1.padding == (kernel // 2, kernel // 2)
    assert isinstance(encoder.maxpool, pool)


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet50"])
def test_convolutions_have_no_bias_and_batch_norms_the_papers_constants(name):
    encoder = on_meta(name)
    assert all(m.bias is None for m in encoder.modules() if isinstance(m, nn.Conv2d))
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    # google-research/simclr, tf2/resnet.py: BATCH_NORM_EPSILON 1e-5; flag batch_norm_decay 0.9, torch's 1 - momentum.
    assert {(m.momentum, m.eps) for m in norms} == {(0.1, 1e-5)}


def test_residual_branches_start_at_zero():
    # google-research/simclr, tf2/resnet.py: the last batch norm of each block has init_zero=True.
    encoder = make_encoder("small")
    blocks = [encoder.layer1[0], encoder.layer2[0], encoder.layer3[0]]
    assert all((block.bn2.weight == 0).all() for block in blocks)
    assert all((block.bn1.weight == 1).all() for block in blocks)
    plain = make_encoder("small", zero_init_last=False)
    assert all((m.weight == 1).all() for m in plain.modules() if isinstance(m, nn.BatchNorm2d))


def test_convolutions_start_as_variance_scaling():
    # google-research/simclr, tf2/resnet.py: tf.keras.initializers.VarianceScaling(): deviation sqrt(1 / fan in).
    torch.manual_seed(0)
    for convolution in (make_encoder("resnet18").layer3[0].conv2, make_encoder("small", width=4).conv1):
        weight = convolution.weight.detach()
        expected = math.sqrt(1 / weight[0].numel())
        assert float(weight.std()) == pytest.approx(expected, rel=0.05)
        assert float(weight.abs().max()) <= 2 * expected / 0.8796 + 1e-6
