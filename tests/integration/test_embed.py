"""Embedding whole data sets: every image exactly once, the same vectors after a kill, nothing silently absent."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simclr_ray import embed, load_encoder, storage
from simclr_ray.data.decode import Limits, decode
from simclr_ray.data.manifest import Manifest, read_manifest
from simclr_ray.data.shards import ImageRow
from simclr_ray.errors import ConfigError, DataError, NumericsError
from simclr_ray.publish.embed_folder import MANIFEST_NAME, read_embedding
from simclr_ray.publish.parts import part_of, vectors_of
from tests.conftest import FASHION, make_data_set, real_rows
from tests.integration.test_pretrain import kill_worker, when
from tests.unit.evaluate.test_evaluate import make_run, settings

pytestmark = pytest.mark.integration

ROWS = 700
BROKEN = {3: b"", 258: b"no image at all", 699: b"\x89PNG\r\n\x1a\n cut off"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """700 images, three of which do not decode, in shards of 100."""
    rows = [replace(row, image=BROKEN.get(i, row.image)) for i, row in enumerate(real_rows(ROWS))]
    return make_data_set(tmp_path_factory.mktemp("images"), rows)


@pytest.fixture(scope="module")
def run(images: Manifest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(settings(tmp_path_factory.mktemp("runs") / "run", (images, images)), images)


@pytest.fixture(scope="module")
def embedded(local_ray: None, run: str, images: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "out"
    report = embed(run, images.folder, str(out), dtype="float32", rows_per_file=256)
    assert (report.rows, report.parts, report.kept) == (ROWS - len(BROKEN), 3, 0)
    return out


def table_of(folder: str | Path) -> pa.Table:
    names = [name for name in storage.list_names(str(folder)) if part_of(name)]
    read = [pq.read_table(io.BytesIO(storage.read_bytes(storage.join(str(folder), name)))) for name in names]
    return pa.concat_tables(read)


def test_every_image_that_decodes_is_there_once_with_its_vector(embedded: Path, run: str, images: Manifest) -> None:
    table = table_of(embedded)
    good = [i for i in range(ROWS) if i not in BROKEN]
    assert table["sample_id"].to_pylist() == good
    rows = real_rows(ROWS)
    assert table["uri"].to_pylist() == [rows[i].uri for i in good]
    assert table["label"].to_pylist() == [rows[i].label for i in good]
    decoded = [decode(rows[i].image, Limits()) for i in good]
    expected = load_encoder(run).embed(decoded)  # type: ignore[arg-type]
    np.testing.assert_allclose(vectors_of(table), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_set_without_an_image_is_finished_and_no_success(local_ray: None, run: str, tmp_path: Path) -> None:
    nothing = make_data_set(tmp_path / "data", [ImageRow(b"no image", 0, f"{i}.png") for i in range(70)])
    for _ in range(2):  # and the same when it is asked again
        with pytest.raises(DataError, match="no image of the data set could be embedded") as caught:
            embed(run, nothing.folder, str(tmp_path / "out"), rows_per_file=256)
        assert "70 not_an_image" in str(caught.value)
    assert len(pq.read_table(tmp_path / "out" / "rejected.parquet")) == 70


def test_what_does_not_decode_is_listed(embedded: Path) -> None:
    listed = pq.read_table(embedded / "rejected.parquet").to_pylist()
    assert [row["sample_id"] for row in listed] == sorted(BROKEN)
    assert [row["reason"] for row in listed] == ["empty", "not_an_image", "truncated"]
    assert listed[0]["uri"] == real_rows(4)[3].uri
    said = read_embedding(str(embedded))
    assert said["rejected"] == {"empty": 1, "not_an_image": 1, "truncated": 1}
    assert said["rows"] == ROWS - len(BROKEN)
    assert sorted(path.name for path in embedded.iterdir()) == sorted(
        [*(one["name"] for one in said["files"]), "manifest.json", "rejected.parquet"]
    )


def test_a_finished_work_is_left_alone(embedded: Path, run: str, images: Manifest) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in embedded.iterdir()}
    report = embed(run, images.folder, str(embedded), dtype="float32", rows_per_file=256)
    assert report.kept == report.parts == 3
    assert {path.name: path.stat().st_mtime_ns for path in embedded.iterdir()} == before


def test_what_is_whole_is_kept_and_what_is_damaged_or_missing_is_made_again(
    embedded: Path, run: str, images: Manifest, tmp_path: Path
) -> None:
    """As after a kill and a disk that lost bytes: one file gone, one cut off, one whole; no manifest."""
    out = tmp_path / "out"
    out.mkdir()
    said = json.loads((embedded / MANIFEST_NAME).read_text())
    (out / "_begun.json").write_text(json.dumps(said["identity"]))
    first, second, _ = [one["name"] for one in said["files"]]
    (out / first).write_bytes((embedded / first).read_bytes())
    (out / second).write_bytes((embedded / second).read_bytes()[:-100])
    kept = (out / first).stat().st_mtime_ns
    report = embed(run, images.folder, str(out), dtype="float32", rows_per_file=256)
    assert report.kept == 1
    assert (out / first).stat().st_mtime_ns == kept
    for path in embedded.glob("*.parquet"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert not (out / "_begun.json").exists()


def test_another_encoder_data_set_or_option_is_refused(
    embedded: Path, run: str, images: Manifest, data_set: Manifest, tmp_path: Path
) -> None:
    other = make_run(settings(tmp_path / "run", (images, images), "run.seed=9"), images)
    with pytest.raises(ConfigError, match="another work") as caught:
        embed(other, images.folder, str(embedded), dtype="float32", rows_per_file=256)
    assert "encoder: there" in str(caught.value)
    with pytest.raises(ConfigError, match="data_set: there"):
        embed(run, data_set.folder, str(embedded), dtype="float32", rows_per_file=256)
    with pytest.raises(ConfigError, match="dtype: there 'float32', now 'float16'"):
        embed(run, images.folder, str(embedded), rows_per_file=256)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty and holds no embedding"):
        embed(run, images.folder, str(tmp_path / "full"))


def test_a_folder_that_is_not_finished_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no embedding here"):
        read_embedding(str(tmp_path))
    (tmp_path / "_begun.json").write_text("{}")
    with pytest.raises(DataError, match="not finished"):
        read_embedding(str(tmp_path))


def test_an_embedding_that_is_not_finite_ends_the_work(local_ray: None, images: Manifest, tmp_path: Path) -> None:
    import torch

    from simclr_ray.train import checkpoint as ckpt
    from simclr_ray.train.build import build_model

    config = settings(tmp_path / "run", (images, images))
    made = make_run(config, images, steps=())
    tensors = ckpt.model_tensors(build_model(config))
    tensors["encoder.conv1.weight"] = torch.full_like(tensors["encoder.conv1.weight"], float("nan"))
    ckpt.save(f"{made}/checkpoints", ckpt.Checkpoint(1, tensors, {}, {}))
    with pytest.raises(NumericsError, match="not finite"):
        embed(made, images.folder, str(tmp_path / "out"))
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_store_to_a_store(local_ray: None, s3_folder: str, run: str) -> None:
    rows = [ImageRow(row.image, row.label, row.uri) for row in real_rows(300)]
    manifest = make_data_set_in(f"{s3_folder}/data", rows)
    report = embed(run, manifest.folder, f"{s3_folder}/out", rows_per_file=256)
    assert table_of(f"{s3_folder}/out")["sample_id"].to_pylist() == list(range(300))
    assert embed(run, manifest.folder, f"{s3_folder}/out", rows_per_file=256).kept == report.parts == 2


def make_data_set_in(folder: str, rows: list[ImageRow]) -> Manifest:
    from simclr_ray.data.manifest import write_manifest
    from simclr_ray.data.shards import write_shard

    manifest = Manifest(folder, (write_shard(folder, 0, rows, 16),), unit_rows=16)
    write_manifest(manifest)
    return manifest


@pytest.mark.slow
def test_a_killed_work_is_continued_without_duplicates_or_holes(run: str, tmp_path: Path) -> None:
    """SIGKILL to the driver, in the middle; the same command then ends with an undisturbed twin's vectors."""
    data, out, twin = str(FASHION / "train"), tmp_path / "out", tmp_path / "twin"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def command(folder: Path) -> list[str]:
        verb = [sys.executable, "-m", "simclr_ray.cli", "embed", run, data, str(folder), "--dtype", "float32"]
        return [*verb, "--rows-per-file", "256", "--actors", "1:1"]

    first = subprocess.Popen(command(out), env=environment, stdout=subprocess.DEVNULL)
    when(lambda: len(list(out.glob("embeddings-*"))) >= 3, first.kill)()
    assert first.wait() == -signal.SIGKILL
    assert not (out / MANIFEST_NAME).exists()
    second = subprocess.run(command(out), env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert second.returncode == 0, second.stderr
    assert "files are there already" in second.stdout
    undisturbed = subprocess.run(command(twin), env=environment, capture_output=True, timeout=200, check=False)
    assert undisturbed.returncode == 0
    table, expected = table_of(out), table_of(twin)
    assert table["sample_id"].to_pylist() == list(range(read_manifest(data).rows))
    assert table.equals(expected)


@pytest.mark.slow
def test_a_lost_actors_parts_are_made_by_another(local_ray: None, run: str, tmp_path: Path) -> None:
    """SIGKILL to the process of the only actor, after its first file."""
    out = tmp_path / "out"
    killer = threading.Thread(
        target=when(lambda: len(list(out.glob("embeddings-*"))) >= 1, lambda: kill_worker("MapWorker"))
    )
    killer.start()
    report = embed(run, str(FASHION / "test"), str(out), rows_per_file=256, actors=(1, 1))
    killer.join()
    assert report.rows == read_manifest(str(FASHION / "test")).rows
    assert table_of(out)["sample_id"].to_pylist() == list(range(report.rows))
