"""What a report shows of an encoder: samples of any data set, maps that machines agree on, neighbours of others."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simclr_ray.data.manifest import Manifest, read_manifest, write_manifest
from simclr_ray.data.shards import ImageRow
from simclr_ray.errors import ConfigError, DataError
from simclr_ray.evaluate.encode import TrainedEncoder
from simclr_ray.publish.looks import Sample, encoded, look_at, principal, sample_of, sprite, umap_of
from simclr_ray.train.build import build_model
from simclr_ray.train.derive import policy_of
from tests.conftest import make_data_set, real_rows, small_run


def sample(manifest: Manifest, count: int, tmp_path: Path) -> Sample:
    config = small_run(tmp_path / "run", manifest)
    return sample_of(config, policy_of(config.views), count)


def test_a_sample_is_whole_and_the_same_each_time(data_set: Manifest, tmp_path: Path) -> None:
    one, again = (sample(data_set, 40, tmp_path) for _ in range(2))
    assert one.views.shape == (40, 16, 16, 3)
    assert one.pairs.shape == (40, 2, 16, 16, 3)
    assert len(set(one.ids.tolist())) == 40
    assert one.labels is not None
    assert len(one.labels) == 40
    assert np.array_equal(one.pairs, again.pairs)
    rows = real_rows(400)
    assert list(one.labels) == [rows[sample_id].label for sample_id in one.ids.tolist()]


def test_unlabelled_small_and_broken_data_sets_have_samples_too(tmp_path: Path) -> None:
    rows = [ImageRow(b"" if i % 3 == 0 else row.image, None, row.uri) for i, row in enumerate(real_rows(12))]
    fewer_than_a_unit = replace(make_data_set(tmp_path / "data", rows), classes=())
    write_manifest(fewer_than_a_unit)
    found = sample(read_manifest(fewer_than_a_unit.folder), 100, tmp_path)
    assert found.labels is None
    assert sorted(found.ids.tolist()) == [1, 2, 4, 5, 7, 8, 10, 11]


def test_a_lost_shard_is_passed_over_and_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    manifest = make_data_set(tmp_path / "data", real_rows(200))
    (tmp_path / "data" / "shard-00000.parquet").unlink()
    found = sample(manifest, 500, tmp_path)
    assert min(found.ids.tolist()) >= 100
    for shard in (tmp_path / "data").glob("shard-*"):
        shard.unlink()
    with pytest.raises(DataError, match="two images"):
        sample(manifest, 500, tmp_path)


def test_a_look_measures_and_finds_others(data_set: Manifest, tmp_path: Path) -> None:
    config = small_run(tmp_path / "run", data_set)
    encoder = TrainedEncoder(build_model(config).eval(), policy_of(config.views), step=3)
    look = look_at(encoder, sample(data_set, 60, tmp_path), queries=10, neighbours=5)
    assert look.neighbours.shape == look.similarity.shape == (10, 5)
    labels = look.sample.labels
    assert labels is not None
    assert sorted({labels[row] for row in look.queries}) == sorted(set(labels))[:10]
    for query, found, near in zip(look.queries, look.neighbours.tolist(), look.similarity.tolist(), strict=True):
        assert query not in found
        assert len(set(found)) == 5
        assert near == sorted(near, reverse=True)
    assert look.spectrum[0] == 1
    assert list(look.spectrum) == sorted(look.spectrum, reverse=True)
    assert look.rankme >= 1


@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 99))
def test_components_are_uncorrelated_the_greatest_first_and_of_one_sign(n: int, d: int, seed: int) -> None:
    h = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    components, shares = principal(h, 4)
    assert components.shape == (n, min(4, n, d))
    assert list(shares) == sorted(shares, reverse=True)
    assert sum(shares) <= 1 + 1e-9
    gram = components.T @ components
    assert np.allclose(gram, np.diag(np.diag(gram)), atol=1e-6 * max(1.0, gram.max()))
    mirrored, _ = principal(-h, 4)
    for column in range(components.shape[1]):
        if np.abs(components[:, column]).max() > 1e-6:
            assert components[np.abs(components[:, column]).argmax(), column] > 0
            assert mirrored[np.abs(mirrored[:, column]).argmax(), column] > 0


def test_the_map_of_points_on_a_line_is_the_line() -> None:
    h = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-6.0, -8.0]])
    components, shares = principal(h, 2)
    assert shares[0] == pytest.approx(1)
    # The centre is (-1, -4/3); distances along (3, 4)/5 from it, with the farthest made positive.
    assert components[:, 0].tolist() == pytest.approx([-5 / 3, -20 / 3, 25 / 3])


def test_pictures_are_small_new_files() -> None:
    large = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encoded(large, 160))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (107, 160))
    little = large[:28, :28]
    with Image.open(io.BytesIO(encoded(little, 160))) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), little)
    with Image.open(io.BytesIO(sprite(np.stack([little] * 5), 32, 4))) as picture:
        assert picture.size == (128, 64)


@pytest.mark.slow  # its first fit compiles for half a minute
def test_a_umap_keeps_groups_together_and_is_the_same_each_time() -> None:
    """Of 60 embeddings around three far directions, each one's nearest on the map is of its own group."""
    pytest.importorskip("umap", reason="no umap-learn: pip install 'simclr-ray[umap]'")
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(60) % 3
    h = torch.eye(3, 16)[group] + 0.05 * torch.randn(60, 16, generator=generator)
    places = umap_of(h)
    assert places is not None
    assert places.shape == (60, 2)
    assert np.array_equal(umap_of(h), places)  # type: ignore[arg-type]
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(60)
    assert (group[apart.argmin(axis=1)] == group).all()
    few = umap_of(h[:4])
    assert few is not None
    assert few.shape == (4, 2)


def test_there_is_no_umap_of_three_embeddings_nor_of_a_collapsed_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=None))  # it is not asked
    assert umap_of(torch.randn(3, 16)) is None
    assert umap_of(torch.ones(60, 16)) is None
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace())  # another package of that name
    with pytest.raises(ConfigError, match="needs umap-learn"):
        umap_of(torch.randn(60, 16))
