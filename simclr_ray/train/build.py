"""From a config to the model it names, with the initial weights of its seed."""

from __future__ import annotations

import torch
from torch import nn

from simclr_ray.config import Config
from simclr_ray.model.encoder import make_encoder
from simclr_ray.model.projector import make_projector
from simclr_ray.model.simclr import SimCLR


def build_model(config: Config) -> SimCLR:
    """The model on the CPU in fp32, the same weights on every rank; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        encoder = make_encoder(
            config.model.encoder,
            width=config.model.width,
            stem=config.model.stem,
            zero_init_last=config.model.zero_init_last,
        )
        projector: nn.Module
        if config.distill.teacher is not None:  # what a student learns is a classifier
            projector = nn.Linear(encoder.embedding_dim, config.model.projection_dim)
        else:
            projector = make_projector(
                encoder.embedding_dim,
                layers=config.model.projector_layers,
                hidden_dim=config.model.projector_hidden,
                output_dim=config.model.projection_dim,
            )
    return SimCLR(encoder, projector)
