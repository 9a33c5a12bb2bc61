"""Neighbours over files of embeddings are those of comparing with every vector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_ray import load_encoder, neighbours
from simclr_ray.data.decode import Limits
from simclr_ray.data.inputs import columns_of
from simclr_ray.data.manifest import Manifest
from simclr_ray.errors import ConfigError, DataError, StorageError
from simclr_ray.evaluate.knn import nearest
from simclr_ray.publish import embed as verb
from simclr_ray.publish import embed_folder as folder
from simclr_ray.publish.embed_part import PartMaker
from simclr_ray.publish.parts import cut, look_at_part, read_part, vectors_of
from tests.conftest import make_data_set, real_rows
from tests.unit.evaluate.test_evaluate import make_run, settings

pytest.importorskip("faiss")
ROWS = 700


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding of three files, made as the verb makes it, but by this process alone."""
    base = tmp_path_factory.mktemp("neighbours")
    manifest = make_data_set(base / "data", real_rows(ROWS))
    run = make_run(settings(base / "run", (manifest, manifest)), manifest)
    return finished(base / "out", run, manifest)


def finished(out: Path, run: str, manifest: Manifest) -> Path:
    trained, options = load_encoder(run), folder.EmbedOptions(dtype="float32", rows_per_file=256)
    identity = folder.identity_of(trained, manifest, Limits(), options, 256)
    order = verb._order(str(out), trained, manifest, Limits(), options, identity)
    assert columns_of(manifest, "label") == order.columns
    assert folder.claim_folder(str(out), identity) is None
    maker = PartMaker(order, trained.model.encoder, torch.device("cpu"))
    parts = cut(ROWS, 256)
    for part in parts:
        maker.make(part)
    found = {part: look_at_part(str(out / part.name)) for part in parts}
    folder.finish_folder(order, identity, parts, found, run=run, step=trained.step)  # type: ignore[arg-type]
    return out


def vectors(folder: Path) -> torch.Tensor:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return torch.from_numpy(np.concatenate([vectors_of(read_part(str(folder / one["name"]))) for one in files]))


@pytest.mark.parametrize("query", [0, 255, 256, 699])
def test_neighbours_of_an_image_of_the_set_are_exact(embedded: Path, query: int) -> None:
    found = neighbours(str(embedded), sample_id=query, k=12)
    pool = vectors(embedded)
    similarity, rows = nearest(pool, pool[query : query + 1], 13)
    expected = [row for row in rows[0].tolist() if row != query][:12]
    assert [one.sample_id for one in found] == expected
    assert [one.similarity for one in found] == pytest.approx(similarity[0, 1:].tolist(), abs=1e-5)
    stored = real_rows(ROWS)
    assert all((one.uri, one.label) == (stored[one.sample_id].uri, stored[one.sample_id].label) for one in found)


def test_an_image_file_finds_itself_first(embedded: Path, tmp_path: Path) -> None:
    (tmp_path / "query.png").write_bytes(real_rows(401)[400].image)
    found = neighbours(str(embedded), image=str(tmp_path / "query.png"), k=3)
    assert found[0].sample_id == 400
    assert found[0].similarity == pytest.approx(1, abs=1e-5)


def test_more_neighbours_than_images_are_all_images(embedded: Path) -> None:
    found = neighbours(str(embedded), sample_id=5, k=10_000)
    assert sorted(one.sample_id for one in found) == [i for i in range(ROWS) if i != 5]


def test_queries_that_cannot_work_are_a_sentence(embedded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one query"):
        neighbours(str(embedded))
    with pytest.raises(ConfigError, match="1 or more"):
        neighbours(str(embedded), sample_id=1, k=0)
    with pytest.raises(DataError, match=r"no vector of this id.*700.*0 to 699"):
        neighbours(str(embedded), sample_id=ROWS)
    with pytest.raises(StorageError, match="no image here"):
        neighbours(str(embedded), image=str(tmp_path / "absent.png"))
    (tmp_path / "letter.png").write_text("dear")
    with pytest.raises(DataError, match="does not decode: not_an_image"):
        neighbours(str(embedded), image=str(tmp_path / "letter.png"))
    with pytest.raises(DataError, match="no embedding here"):
        neighbours(str(tmp_path), sample_id=1)


def test_another_encoder_cannot_ask(embedded: Path, tmp_path: Path) -> None:
    manifest = make_data_set(tmp_path / "data", real_rows(64))
    other = make_run(settings(tmp_path / "run", (manifest, manifest), "run.seed=9"), manifest)
    (tmp_path / "query.png").write_bytes(real_rows(1)[0].image)
    with pytest.raises(ConfigError, match="another encoder"):
        neighbours(str(embedded), image=str(tmp_path / "query.png"), run=other)
