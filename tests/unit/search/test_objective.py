"""Measures on matrices of known answer, and what counts as better."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import DataError
from simclr_ray.evaluate.encode import random_encoder
from simclr_ray.observe.health import lidar, rankme
from simclr_ray.search.objective import WORST, agreement, better_is_more, measures, spearman, unbeaten
from simclr_ray.search.probe import ProbeSet, read_probe
from simclr_ray.search.space import LABELLED, MEASURES
from simclr_ray.train.derive import limits_of, policy_of
from tests.conftest import small_run


def cross(width: int, directions: int, size: float) -> torch.Tensor:
    """Means at plus and minus `size` along the first axes: the same variance in each of `directions`."""
    axes = size * torch.eye(width, dtype=torch.float64)[:directions]
    return torch.cat([axes, -axes])


def spread_views(means: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
    """Views at plus and minus a deviation along every axis about each mean: S_w is exactly diagonal."""
    offsets = torch.diag(deviations)
    return means[:, None] + torch.cat([offsets, -offsets])[None]


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_lidar_counts_directions_in_which_images_differ(directions: int) -> None:
    views = spread_views(cross(6, directions, 10.0), torch.ones(6, dtype=torch.float64))
    assert lidar(views) == pytest.approx(directions, rel=1e-4)


def test_lidar_leaves_out_a_direction_that_views_of_one_image_fill_too() -> None:
    """Images differ alike along both axes, which RankMe counts as two; along the second, views differ far more."""
    means = cross(2, 2, 10.0)
    views = spread_views(means, torch.tensor([1e-2, 1e3], dtype=torch.float64))
    assert lidar(views) == pytest.approx(1.0, abs=1e-3)
    assert rankme(means) == pytest.approx(2.0, rel=1e-5)


def test_lidar_is_the_entropy_of_the_generalised_eigenvalues() -> None:
    """Against numpy on random numbers, by the formula as it is printed: S_w^-1/2 S_b S_w^-1/2."""
    views = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views += 2 * torch.randn(40, 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = views.numpy()
    means = x.mean(axis=1)
    centred = means - means.mean(axis=0)
    s_b = centred.T @ centred / len(means)
    inner = (x - means[:, None]).reshape(-1, 5)
    values, vectors = np.linalg.eigh(inner.T @ inner / len(inner) + 1e-4 * np.eye(5))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    found = np.linalg.eigvalsh(root @ s_b @ root)
    p = found / found.sum() + 1e-7
    assert lidar(views) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_lidar_of_a_collapse_is_one_and_of_nan_is_nan() -> None:
    assert lidar(torch.ones(8, 3, 4)) == pytest.approx(1.0, abs=1e-5)
    assert math.isnan(lidar(torch.full((8, 3, 4), math.nan)))


def test_spearman_on_known_orders() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    # Ties at their mean rank: ranks 1.5 1.5 3 against 1 2 3; sqrt(3)/2 by Pearson's formula.
    assert spearman([0, 0, 1], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1, 2], [1, 2]))


def test_what_is_no_number_is_worst_and_less_may_be_better() -> None:
    for bad in (math.nan, math.inf, None):
        assert better_is_more("rankme", bad) == WORST
    assert better_is_more("rankme", 3.0) > better_is_more("rankme", 2.0) > WORST
    assert better_is_more("alignment", 0.1) > better_is_more("alignment", 0.2) > WORST


def test_agreement_turns_measures_of_which_less_is_better() -> None:
    found = [{"knn_top1": k, "rankme": k, "lidar": -k, "alignment": -k, "uniformity": k, "alignment_uniformity": 1.0}
             for k in (0.1, 0.2, 0.3, 0.4)]  # fmt: skip
    rank = agreement(found, "knn_top1")
    assert rank["rankme"] == pytest.approx(1)
    assert rank["lidar"] == pytest.approx(-1)
    assert rank["alignment"] == pytest.approx(1)
    assert rank["uniformity"] == pytest.approx(-1)
    assert math.isnan(rank["alignment_uniformity"])


@pytest.fixture(scope="module")
def probe(data_set: Manifest) -> ProbeSet:
    config = small_run(Path("unused"), data_set)
    return read_probe(data_set, policy_of(config.views), limits_of(config.data), images=48, voters=150, views=3, seed=0)


def test_the_images_are_read_once_with_labels_and_none_votes_for_itself(data_set: Manifest, probe: ProbeSet) -> None:
    assert probe.images.shape == (48, 16, 16, 3)
    assert probe.views.shape == (48, 3, 16, 16, 3)
    assert probe.labels is not None
    assert probe.labels.shape == (48,)
    assert probe.voters.shape == (150, 16, 16, 3)
    measured = {image.tobytes() for image in probe.images}
    assert not measured & {image.tobytes() for image in probe.voters}
    config = small_run(Path("unused"), data_set)
    again = read_probe(data_set, policy_of(config.views), limits_of(config.data), images=48, voters=0, views=3, seed=0)
    assert (again.images == probe.images).all()
    assert (again.views == probe.views).all()
    assert again.labels is None


@given(st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), max_size=20))
def test_the_front_beats_whatever_is_not_on_it_and_not_itself(scores: list[tuple[float, float]]) -> None:
    kept = [score for score, stays in zip(scores, unbeaten(scores), strict=True) if stays]
    lost = [score for score, stays in zip(scores, unbeaten(scores), strict=True) if not stays]
    assert bool(kept) == bool(scores)
    assert not set(kept) & set(lost)  # equal ones share their fate
    for a, b in lost:
        assert any(x >= a and y >= b and (x > a or y > b) for x, y in kept)
    edge = sorted(set(kept))
    assert edge == sorted(edge, key=lambda one: -one[1])  # more of one is less of the other
    assert len({a for a, _ in edge}) == len(edge)


def test_a_data_set_smaller_than_what_is_asked_is_shared_between_both(data_set: Manifest) -> None:
    config = small_run(Path("unused"), data_set)
    found = read_probe(
        data_set, policy_of(config.views), limits_of(config.data), images=1000, voters=1000, views=2, seed=0
    )
    assert len(found.images) == len(found.voters) == 200


def test_no_image_that_decodes_is_an_error(data_set: Manifest) -> None:
    config = small_run(Path("unused"), data_set, data__min_side=100)
    with pytest.raises(DataError, match="two images"):
        read_probe(data_set, policy_of(config.views), limits_of(config.data), images=16, voters=0, views=2, seed=0)


def test_every_measure_is_taken_with_labels_and_the_label_free_ones_without(
    data_set: Manifest, probe: ProbeSet
) -> None:
    config = small_run(Path("unused"), data_set)
    policy = policy_of(config.views)
    encoder = random_encoder(config, probe.images, policy)
    found = measures(encoder.embed, probe, policy, config.evaluate)
    assert tuple(found) == MEASURES
    assert all(math.isfinite(value) for value in found.values())
    assert found["knn_top1"] > 0.2  # of ten classes: chance is 0.1
    assert found["alignment_uniformity"] == found["alignment"] + found["uniformity"]
    bare = ProbeSet(probe.images, probe.views, None, probe.voters[:0], probe.voters_labels[:0])
    without = measures(encoder.embed, bare, policy, config.evaluate)
    assert without == {name: value for name, value in found.items() if name not in LABELLED}


def test_an_encoder_that_gives_nan_is_nan_in_every_measure(data_set: Manifest, probe: ProbeSet) -> None:
    config = small_run(Path("unused"), data_set)
    found = measures(lambda x: torch.full((len(x), 4), math.nan), probe, policy_of(config.views), config.evaluate)
    assert set(found) == set(MEASURES)
    assert all(math.isnan(value) for value in found.values())
