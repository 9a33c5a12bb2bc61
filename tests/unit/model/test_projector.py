"""The projector and the network around it."""

import pytest
import torch
from torch import nn

from simclr_ray.errors import ConfigError
from simclr_ray.model.batch_norm import GlobalBatchNorm, synchronise_batch_norm
from simclr_ray.model.encoder import make_encoder
from simclr_ray.model.projector import make_projector
from simclr_ray.model.simclr import SimCLR


def dense_shapes(module: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    ("layers", "hidden_dim", "expected"),
    [
        (1, None, [(2048, 128)]),
        (2, None, [(2048, 2048), (2048, 128)]),  # SimCLR v1, section 4.2; output 128, section 2.2
        (3, None, [(2048, 2048), (2048, 2048), (2048, 128)]),  # SimCLR v2, section 2: one layer deeper
        (3, 512, [(2048, 512), (512, 512), (512, 128)]),
    ],
)
def test_layers_and_widths(layers, hidden_dim, expected):
    with torch.device("meta"):
        projector = make_projector(2048, layers=layers, hidden_dim=hidden_dim)
    assert dense_shapes(projector) == expected


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_dense_is_free_of_bias_and_normalized(layers):
    # google-research/simclr, tf2/model.py, ProjectionHead: use_bias=False and use_bn=True on all, ReLU but at the end.
    projector = make_projector(16, layers=layers, output_dim=8)
    assert [type(m) for m in projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (layers - 1) + [
        nn.Linear,
        nn.BatchNorm1d,
    ]
    assert all(m.bias is None for m in projector if isinstance(m, nn.Linear))
    assert projector(torch.randn(4, 16)).shape == (4, 8)


def test_dense_layers_start_small():
    # google-research/simclr, tf2/model.py, LinearLayer: RandomNormal(stddev=0.01).
    torch.manual_seed(0)
    assert float(make_projector(256, layers=2)[0].weight.detach().std()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("device_type", [None, "cpu", "cuda"])
def test_the_last_beta_stays_zero_through_conversion_and_loading(device_type):
    # google-research/simclr, tf2/model.py, BatchNormRelu: center=False for the last layer: a gamma and no beta.
    projector: nn.Module = make_projector(16, layers=2, output_dim=8)
    keys = list(projector.state_dict())
    if device_type is not None:
        projector = synchronise_batch_norm(projector, device_type=device_type)
    projector.load_state_dict(projector.state_dict())
    assert list(projector.state_dict()) == keys
    first, last = projector[1], projector[4]
    assert first.bias.requires_grad
    assert last.weight.requires_grad
    assert not last.bias.requires_grad
    assert (last.bias == 0).all()


def test_conversion_picks_the_class_and_keeps_the_parameters():
    for device_type, expected in (("cpu", GlobalBatchNorm), ("cuda", nn.SyncBatchNorm)):
        module = SimCLR(make_encoder("small"), make_projector(128, layers=2)).eval()
        before = {name: id(p) for name, p in module.named_parameters()}
        module = synchronise_batch_norm(module, device_type=device_type)
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 11
        assert all(isinstance(norm, expected) for norm in norms)
        assert {name: id(p) for name, p in module.named_parameters()} == before
        assert not any(norm.training for norm in norms)


@pytest.mark.parametrize("size", ["embedding_dim", "layers", "hidden_dim", "output_dim"])
def test_sizes_below_one_are_refused(size):
    sizes = {"embedding_dim": 8, "layers": 2, "hidden_dim": 8, "output_dim": 8, size: 0}
    with pytest.raises(ConfigError, match=rf"projector\.{size}"):
        make_projector(sizes.pop("embedding_dim"), **sizes)


def test_simclr_projects_its_embedding():
    model = SimCLR(make_encoder("small"), make_projector(128, layers=2, output_dim=64)).eval()
    images = torch.rand(4, 3, 28, 28)
    assert model.embed(images).shape == (4, 128)
    assert model(images).shape == (4, 64)
    torch.testing.assert_close(model(images), model.projector(model.embed(images)))
