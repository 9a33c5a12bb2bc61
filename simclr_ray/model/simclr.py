"""The network that pre-training trains: encoder, then projector."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class SimCLR(nn.Module):
    """Images -> projections, for the loss; and images -> embeddings, for everything after pre-training.

    Both views of all images go through in one call: apart, their batch norm statistics would tell which view is which.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, views: Tensor) -> Tensor:
        """Projections z, (m, output_dim), of views (m, 3, H, W)."""
        return cast(Tensor, self.projector(self.embed(views)))

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings h, (m, embedding_dim), of images (m, 3, H, W)."""
        return cast(Tensor, self.encoder(images))
