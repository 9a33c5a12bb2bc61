"""The projector g: embedding h -> projection z, the part that only the loss sees.

As google-research/simclr builds it (tf2/model.py, ProjectionHead and LinearLayer): dense layers without bias, each
followed by batch norm, ReLU between them, and no beta in the last batch norm.
"""

from __future__ import annotations

from torch import nn

from simclr_ray.errors import ConfigError

_DENSE_INIT_STD = 0.01
"""google-research/simclr, tf2/model.py, LinearLayer: RandomNormal(stddev=0.01)."""


def make_projector(
    embedding_dim: int, *, layers: int, hidden_dim: int | None = None, output_dim: int = 128
) -> nn.Sequential:
    """Build the projector.

    Args:
        embedding_dim: Width of the embedding h.
        layers: Dense layers: 2 is SimCLR v1, 3 is SimCLR v2, 1 is the linear projector of the ablation (v1, figure 8).
        hidden_dim: Width between the layers; None = the embedding's, as in both versions.
        output_dim: Width of the projection z.

    Returns:
        A module (m, embedding_dim) -> (m, output_dim).

    Raises:
        ConfigError: A size below 1.
    """
    hidden_dim = embedding_dim if hidden_dim is None else hidden_dim
    sizes = {"embedding_dim": embedding_dim, "layers": layers, "hidden_dim": hidden_dim, "output_dim": output_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError("the projector needs a positive size", where=f"projector.{name}", got=size)
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [_dense(embedding_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
        embedding_dim = hidden_dim
    return nn.Sequential(*modules, _dense(embedding_dim, output_dim), _batch_norm_without_beta(output_dim))


def first_layer(projector: nn.Module) -> nn.Sequential | None:
    """The projector's first layer up to its ReLU, from which SimCLR v2 fine-tunes; None where there is no ReLU."""
    modules = list(projector.children())
    return nn.Sequential(*modules[:3]) if len(modules) > 3 else None


def _dense(inputs: int, outputs: int) -> nn.Linear:
    """Without bias: the batch norm that follows would subtract it again."""
    dense = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(dense.weight, std=_DENSE_INIT_STD)
    return dense


def _batch_norm_without_beta(features: int) -> nn.BatchNorm1d:
    """Batch norm with a trained gamma and a beta that stays at zero.

    The beta is kept as a parameter that asks for no gradient, not dropped: so the layer is an ordinary BatchNorm1d to
    the state dict and to both conversions (which carry the parameter over as it is), and optimizers pass it by.
    """
    norm = nn.BatchNorm1d(features)
    norm.bias.requires_grad_(False)
    return norm
