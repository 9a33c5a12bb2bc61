"""Weighted nearest-neighbour accuracy: the cheapest test of an encoder that needs labels but no training.

Works on embeddings of frozen encoders; computes nothing of its own. Similarities are visited in tiles, so memory does
not grow with the product of the two set sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray.errors import ConfigError, DataError

_QUERY_ROWS = 1024
_TRAIN_ROWS = 8192  # a tile of 1024 x 8192 float32 is 32 MiB


@torch.no_grad()
def knn_top1(
    train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Classify by a vote of the k most similar training embeddings; return the accuracy.

    A neighbour's vote weighs exp(cosine similarity / temperature) (Wu et al. 2018, "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", section 3.4, with the paper's temperature).

    Args:
        train_h: training embeddings, (n, d); rows are L2-normalised here.
        train_y: training labels, (n,), integers >= 0.
        test_h: test embeddings, (m, d).
        test_y: test labels, (m,). A class that training lacks counts as wrong.
        k: neighbours that vote, 1 <= k <= n.
        temperature: > 0; smaller trusts the nearest more.

    Returns:
        Fraction of test embeddings classified correctly.

    Raises:
        DataError: a set is empty or not finite, or its shapes do not fit.
        ConfigError: `k` or `temperature` is out of range.
    """
    train_h, train_y = check_labelled(train_h, train_y, where="training embeddings")
    test_h, test_y = check_labelled(test_h, test_y, where="test embeddings")
    check_same_width(train_h, test_h)
    if not 1 <= k <= len(train_h):
        raise ConfigError(
            "the number of voting neighbours does not fit the training set",
            where="evaluate.knn_k",
            got=k,
            expected=f"1 to {len(train_h)}, the number of training embeddings",
        )
    if not temperature > 0:
        raise ConfigError("the kNN temperature must be positive", where="temperature", got=temperature)
    similarity, index = nearest(train_h, test_h, k)  # (m, k) each
    # Weights relative to the best neighbour: the same vote, and no overflow however small the temperature.
    weight = torch.exp((similarity - similarity[:, :1]) / temperature)
    num_classes = int(train_y.max()) + 1
    votes = torch.zeros(len(test_h), num_classes, device=weight.device)
    votes.scatter_add_(1, train_y[index], weight)
    return float((votes.argmax(dim=1) == test_y).double().mean())


@torch.no_grad()
def nearest(pool: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find each query's k most similar rows of `pool` by cosine similarity.

    Args:
        pool: embeddings to search, (n, d), k <= n.
        queries: embeddings to search for, (m, d).
        k: neighbours a query.

    Returns:
        Similarities (m, k), greatest first, and row numbers in `pool` (m, k).
    """
    assert pool.shape[1:] == queries.shape[1:], f"widths differ: {tuple(pool.shape)} and {tuple(queries.shape)}"
    assert 1 <= k <= len(pool), f"k = {k} of {len(pool)} rows"
    pool, queries = F.normalize(pool.float(), dim=1), F.normalize(queries.float(), dim=1)
    found = [_nearest_rows(pool, rows, k) for rows in torch.split(queries, _QUERY_ROWS)]
    return torch.cat([value for value, _ in found]), torch.cat([index for _, index in found])


def _nearest_rows(pool: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search the pool tile by tile, keeping the best k so far: memory of one tile."""
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(pool), _TRAIN_ROWS):
        tile = queries @ pool[start : start + _TRAIN_ROWS].T  # (<= 1024, <= 8192)
        value, index = tile.topk(min(k, tile.shape[1]), dim=1)
        best, where = torch.cat([best, value], dim=1), torch.cat([where, index + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    return best, where


def check_labelled(h: Tensor, y: Tensor, *, where: str) -> tuple[Tensor, Tensor]:
    """Return embeddings as float32 (n, d) and labels as int64 (n,), or say what is wrong with them.

    Raises:
        DataError: empty, not finite, of unfit shapes, or with labels that are not integers >= 0.
    """
    if h.ndim != 2 or h.numel() == 0:
        raise DataError("cannot evaluate these", where=where, got=f"shape {tuple(h.shape)}", expected="(n, d), n > 0")
    if y.shape != h.shape[:1]:
        raise DataError(
            "every embedding needs one label",
            where=where,
            got=f"{tuple(y.shape)} labels for {tuple(h.shape)} embeddings",
            expected=f"({len(h)},) labels",
        )
    if y.is_floating_point() or bool(y.min() < 0):
        raise DataError("labels must be class numbers", where=where, got=y.dtype, expected="integers >= 0")
    if not bool(torch.isfinite(h).all()):
        raise DataError(
            "some embeddings are NaN or infinite", where=where, fix="check the loss curve: the encoder diverged"
        )
    return h.float(), y.long()


def check_same_width(train_h: Tensor, test_h: Tensor) -> None:
    """Raise `DataError` unless both sets have embeddings of one width, as two embeddings of one encoder have."""
    if train_h.shape[1] != test_h.shape[1]:
        raise DataError(
            "training and test embeddings differ in width",
            got=f"{train_h.shape[1]} and {test_h.shape[1]}",
            fix="embed both with the same encoder",
        )
