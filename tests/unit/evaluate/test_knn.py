import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate import knn
from simclr_ray.evaluate.knn import knn_top1, nearest


def blobs(n: int, d: int = 8, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    return torch.eye(3, d)[y] + noise * torch.randn(n, d, generator=generator), y


def twin(train_h, train_y, test_h, test_y, *, k, temperature):
    """The paper's formula, one test embedding at a time."""
    hits = 0
    for h, y in zip(test_h, test_y, strict=True):
        similarity = F.cosine_similarity(train_h, h[None])
        votes = [0.0] * (int(train_y.max()) + 1)
        for i in similarity.argsort(descending=True)[:k].tolist():
            votes[train_y[i]] += float(torch.exp(similarity[i] / temperature))
        hits += votes.index(max(votes)) == int(y)
    return hits / len(test_y)


@pytest.mark.parametrize("tiles", [(7, 16), (1024, 8192)], ids=["small tiles", "one tile"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (100, 1.0)])
def test_it_agrees_with_the_formula_spelt_out(monkeypatch, tiles, k, temperature):
    monkeypatch.setattr(knn, "_QUERY_ROWS", tiles[0])
    monkeypatch.setattr(knn, "_TRAIN_ROWS", tiles[1])
    train, test = blobs(100), blobs(50, seed=1)
    expected = twin(*train, *test, k=k, temperature=temperature)
    assert 0.34 < expected < 1
    assert knn_top1(*train, *test, k=k, temperature=temperature) == pytest.approx(expected)


def test_a_class_that_training_lacks_counts_as_wrong():
    assert knn_top1(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7]), k=1) == 0.5


def test_a_tiny_temperature_trusts_the_nearest_and_does_not_overflow():
    train_h, train_y = torch.tensor([[1.0, 0], [0.9, 0.2], [0.9, 0.21]]), torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.01]]), torch.tensor([0])
    assert knn_top1(train_h, train_y, *test, k=3, temperature=1e-6) == 1
    assert knn_top1(train_h, train_y, *test, k=3, temperature=10.0) == 0


def test_the_nearest_of_an_embedding_is_itself(monkeypatch):
    monkeypatch.setattr(knn, "_TRAIN_ROWS", 7)
    h, _ = blobs(30)
    similarity, index = nearest(h, 3 * h, k=4)
    assert index[:, 0].tolist() == list(range(30))
    assert similarity[:, 0] == pytest.approx(1, abs=1e-5)
    assert bool((similarity[:, :-1] >= similarity[:, 1:]).all())


@pytest.mark.parametrize("k", [0, 11])
def test_k_must_fit_the_training_set(k):
    with pytest.raises(ConfigError, match="1 to 10"):
        knn_top1(*blobs(10), *blobs(5), k=k)


def test_temperature_must_be_positive():
    with pytest.raises(ConfigError, match="temperature"):
        knn_top1(*blobs(10), *blobs(5), k=1, temperature=0.0)


@pytest.mark.parametrize(
    ("h", "y", "message"),
    [
        (torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), "n > 0"),
        (torch.zeros(5), torch.zeros(5, dtype=torch.long), "shape"),
        (torch.zeros(5, 8), torch.zeros(4, dtype=torch.long), "one label"),
        (torch.zeros(5, 8), torch.zeros(5, 1, dtype=torch.long), "one label"),
        (torch.zeros(5, 8), torch.zeros(5), "class numbers"),
        (torch.zeros(5, 8), torch.full((5,), -1), "class numbers"),
        (torch.full((5, 8), torch.nan), torch.zeros(5, dtype=torch.long), "NaN"),
        (torch.zeros(5, 9), torch.zeros(5, dtype=torch.long), "width"),
    ],
)
def test_unfit_sets_are_named(h, y, message):
    with pytest.raises(DataError, match=message):
        knn_top1(*blobs(10), h, y, k=1)
