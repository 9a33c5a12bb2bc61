"""Label-free measures of a representation: is it collapsed, are positives close, are images spread out?

Plain functions of tensors, on any device, without gradients. No n x n matrix is ever held: pairs are visited in tiles
of at most `_TILE` x `_TILE`. Shapes are checked by assertion, because only our own code calls these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 2048  # 16 MiB of float32 a tile: large enough for a fast product, small beside any batch


@torch.no_grad()
def rankme(z: Tensor, eps: float = 1e-7) -> float:
    """Effective rank of a set of embeddings: the exponential of the entropy of its singular values.

    RankMe(Z) = exp(-sum_k p_k log p_k) with p_k = sigma_k / ||sigma||_1 + eps (Garrido et al. 2023, "RankMe", eq. 1).
    From 1 (all embeddings on one line) to min(n, d) (all directions equally used). As in the paper, rows are neither
    centred nor normalised.

    Args:
        z: embeddings or projections, (n, d), n >= 1.
        eps: the paper's constant for float32.

    Returns:
        The rank, or NaN when `z` is not finite.
    """
    assert z.ndim == 2, f"want (n, d), got {tuple(z.shape)}"
    assert len(z), "no rows"
    z = z.double()
    if not bool(torch.isfinite(z).all()):
        return math.nan
    sigma = torch.linalg.svdvals(z)
    # An all-zero matrix has no direction at all; the clamp makes it count as the collapse that it is (rank 1).
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + eps
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def lidar(views: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> float:
    """Effective rank of what tells images apart, measured against what tells views of one image apart.

    Each image is a class, its views are the samples of it. With S_b the covariance of the images' means and S_w that of
    the views about their image's mean plus delta I, LiDAR = exp(-sum_k p_k log p_k) of the eigenvalues l_k of
    S_w^-1/2 S_b S_w^-1/2, p_k = l_k / ||l||_1 + eps (Thilak et al. 2023, "LiDAR: Sensing Linear Probing Performance in
    Joint Embedding SSL Architectures", section 4, with the paper's delta). Directions in which images differ no more
    than their own views do count little, which RankMe does not see.

    Args:
        views: embeddings, (n, q, d): q >= 2 views of each of n >= 2 images. The paper takes 50 views; of fewer, S_w is
            known less well, where n (q - 1) < d only up to delta.
        delta: the paper's regularisation of S_w.
        eps: as in RankMe.

    Returns:
        From 1 to min(n - 1, d), or NaN when `views` is not finite.
    """
    assert views.ndim == 3, f"want (n, q, d), got {tuple(views.shape)}"
    num_images, num_views, width = views.shape
    assert num_images >= 2, "one image differs from no other"
    assert num_views >= 2, "one view differs from no other"
    views = views.double()
    if not bool(torch.isfinite(views).all()):
        return math.nan
    means = views.mean(dim=1)  # (n, d)
    between = (means - means.mean(dim=0)) / math.sqrt(num_images)  # (n, d), S_b = between^T between
    within = ((views - means[:, None]) / math.sqrt(num_images * num_views)).flatten(0, 1)  # (n q, d)
    s_w = within.T @ within + delta * torch.eye(width, dtype=views.dtype, device=views.device)
    # L^-1 S_b L^-T with S_w = L L^T has the eigenvalues of S_w^-1/2 S_b S_w^-1/2: squares of singular values here.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(s_w), between.T, upper=False)  # (d, n)
    eigenvalues = torch.linalg.svdvals(whitened).square()
    p = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny) + eps
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> float:
    """Mean distance of positive pairs on the unit sphere, to the power `alpha` (Wang & Isola 2020, eq. 1).

    Args:
        x: one view's vectors, (n, d); rows are L2-normalised here.
        y: the other view's vectors, (n, d), in the same order.
        alpha: the exponent; the paper uses 2.

    Returns:
        0 (views agree) to 4 (views are opposite) for alpha = 2; lower is closer.
    """
    assert x.ndim == 2, f"want (n, d), got {tuple(x.shape)}"
    assert x.shape == y.shape, f"views differ in shape: {tuple(x.shape)} and {tuple(y.shape)}"
    assert len(x), "no rows"
    distance = torch.linalg.vector_norm(_unit(x) - _unit(y), dim=1)  # (n,)
    return float(distance.pow(alpha).mean())


@torch.no_grad()
def uniformity(x: Tensor, t: float = 2.0) -> float:
    """Log of the mean Gaussian potential over all pairs of different rows (Wang & Isola 2020, eq. 2).

    log mean_{i<j} exp(-t ||x_i - x_j||^2). On the sphere ||a - b||^2 = 2 - 2 a.b, so the exponent is 2t (a.b - 1),
    which is never positive and cannot overflow.

    Args:
        x: vectors, (n, d), n >= 2; rows are L2-normalised here.
        t: width of the potential; the paper uses 2.

    Returns:
        0 (all rows equal) down to -4t (two opposite points); lower is more uniform.
    """
    assert x.ndim == 2, f"want (n, d), got {tuple(x.shape)}"
    assert len(x) >= 2, "a pair needs two rows"
    potentials = [torch.logsumexp(2 * t * (cosine - 1), dim=0) for cosine in _pair_cosines(_unit(x))]
    num_pairs = len(x) * (len(x) - 1) // 2
    return float(torch.logsumexp(torch.stack(potentials).double(), dim=0)) - math.log(num_pairs)


@torch.no_grad()
def contrastive_accuracy(z_a: Tensor, z_b: Tensor) -> float:
    """Fraction of anchors whose most similar vector among the other view's is their own positive.

    Both directions count: 2n anchors, n candidates each, so chance (and a collapsed encoder) scores 1/n. Unlike the
    training metric there are no same-view candidates, so the value does not depend on the loss.

    Args:
        z_a: projections or embeddings of view a, (n, d), n >= 1.
        z_b: those of view b, (n, d), in the same order.
    """
    assert z_a.ndim == 2, f"want (n, d), got {tuple(z_a.shape)}"
    assert z_a.shape == z_b.shape, f"views differ in shape: {tuple(z_a.shape)} and {tuple(z_b.shape)}"
    assert len(z_a), "no rows"
    z_a, z_b = _unit(z_a), _unit(z_b)
    return (_hits(z_a, z_b) + _hits(z_b, z_a)) / (2 * len(z_a))


def _hits(anchors: Tensor, candidates: Tensor) -> int:
    """Count rows of `anchors` whose best candidate has the same row number; the first best wins a tie."""
    best = torch.full((len(anchors),), -math.inf, device=anchors.device)
    where = torch.zeros(len(anchors), dtype=torch.long, device=anchors.device)
    for rows in _tiles(len(anchors)):
        for columns in _tiles(len(candidates)):
            value, index = (anchors[rows] @ candidates[columns].T).max(dim=1)
            better = value > best[rows]
            best[rows] = torch.where(better, value, best[rows])
            where[rows] = torch.where(better, index + columns.start, where[rows])
    return int((where == torch.arange(len(anchors), device=anchors.device)).sum())


def _pair_cosines(x: Tensor) -> Iterator[Tensor]:
    """Yield the cosines of all pairs i < j of unit rows, a flat tensor a tile."""
    for rows in _tiles(len(x)):
        for columns in _tiles(len(x)):
            if columns.start < rows.start:
                continue  # the mirror image of a tile already seen
            cosine = x[rows] @ x[columns].T  # (<= _TILE, <= _TILE)
            if columns.start > rows.start:
                yield cosine.flatten()
            elif len(cosine) > 1:
                i, j = torch.triu_indices(len(cosine), len(cosine), offset=1, device=x.device)
                yield cosine[i, j]


def _tiles(length: int) -> list[slice]:
    return [slice(start, min(start + _TILE, length)) for start in range(0, length, _TILE)]


def _unit(x: Tensor) -> Tensor:
    """Project rows onto the unit sphere in float32 (half precision would blur close pairs); zero rows stay zero."""
    return F.normalize(x.float(), dim=1)
