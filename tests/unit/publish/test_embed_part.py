"""Parts of an embedding: where their images lie, what their files hold, and what counts as whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray import load_encoder
from simclr_ray.data.decode import Limits, decode
from simclr_ray.data.inputs import columns_of
from simclr_ray.data.manifest import Manifest, Shard
from simclr_ray.errors import NumericsError
from simclr_ray.publish.embed_part import EmbedOrder, PartMaker
from simclr_ray.publish.parts import (
    Embedded,
    Part,
    PartNote,
    RejectedImage,
    cut,
    look_at_part,
    part_of,
    ranges_of,
    read_part,
    to_parquet,
    vectors_of,
)
from tests.conftest import make_data_set, real_rows
from tests.unit.evaluate.test_evaluate import make_run, settings

ROWS = 300


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("images"), real_rows(ROWS))


@pytest.fixture(scope="module")
def run(images: Manifest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(settings(tmp_path_factory.mktemp("runs") / "run", (images, images)), images)


def maker(run: str, manifest: Manifest, folder: Path, *, threads: int = 0, **changes: object) -> PartMaker:
    trained = load_encoder(run)
    order = EmbedOrder(
        "work", str(folder), manifest, columns_of(manifest, "label"), Limits(), trained.policy, "float32", "fp32",
        trained.width,
    )  # fmt: skip
    return PartMaker(replace(order, **changes), trained.model.encoder, torch.device("cpu"), threads)  # type: ignore[arg-type]


@given(st.integers(0, 5000), st.integers(1, 900))
def test_every_image_is_in_exactly_one_part(rows: int, rows_per_part: int) -> None:
    parts = cut(rows, rows_per_part)
    assert [i for part in parts for i in range(part.first, part.stop)] == list(range(rows))
    assert [part_of(part.name) for part in parts] == parts
    assert sorted(part.name for part in parts) == [part.name for part in parts]


@given(st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=5), st.integers(1, 70))
def test_ranges_cover_a_part_in_order(groups: list[list[int]], rows_per_part: int) -> None:
    shards = tuple(Shard(f"s{i}.parquet", "parquet", "d", 9999, tuple(one), ()) for i, one in enumerate(groups))
    manifest = Manifest("/unused", shards, unit_rows=8)
    for part in cut(manifest.rows, rows_per_part):
        found = list(ranges_of(manifest, part))
        assert [i for one in found for i in one.sample_ids.tolist()] == list(range(part.first, part.stop))
        assert all(0 <= one.start < one.stop <= one.group_rows for one in found)


def note() -> PartNote:
    return PartNote("work", 10, 14, (RejectedImage(12, "u", "empty", "0 bytes"),))


def some_part() -> bytes:
    vectors = np.arange(6, dtype=np.float16).reshape(3, 2)
    return to_parquet(Embedded([10, 11, 13], ["a", "b", "c"], [1, None, 2], vectors), note(), labelled=True)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(some_part())
    found = look_at_part(str(tmp_path / "part"))
    assert found is not None
    assert (found.note, found.rows, found.bytes) == (note(), 3, len(some_part()))
    table = read_part(str(tmp_path / "part"))
    assert table.schema.field("vector").type == pa.list_(pa.float16(), 2)
    assert table["label"].to_pylist() == [1, None, 2]
    assert (vectors_of(table) == np.arange(6).reshape(3, 2)).all()


def test_no_cut_and_no_flipped_byte_of_a_footer_counts_as_whole(tmp_path: Path) -> None:
    data = some_part()
    footer = int.from_bytes(data[-8:-4], "little") + 8 + 12
    place = tmp_path / "part"
    assert look_at_part(str(place)) is None
    for cut_at in range(0, len(data), 7):
        place.write_bytes(data[:cut_at])
        assert look_at_part(str(place)) is None
    for at in range(len(data) - footer, len(data), 5):
        damaged = bytearray(data)
        damaged[at] ^= 1
        place.write_bytes(damaged)
        assert look_at_part(str(place)) is None, at


def test_a_footer_longer_than_the_first_look_is_read(tmp_path: Path) -> None:
    many = tuple(RejectedImage(i, "x" * 300, "empty", "") for i in range(1000))
    vectors = np.zeros((1, 2), np.float32)
    (tmp_path / "part").write_bytes(
        to_parquet(Embedded([1000], ["u"], [None], vectors), PartNote("w", 0, 1001, many), labelled=False)
    )
    found = look_at_part(str(tmp_path / "part"))
    assert found is not None
    assert len(found.note.rejected) == 1000


@pytest.mark.parametrize("threads", [0, 3])
def test_a_part_has_the_vectors_of_the_encoder_whoever_decodes(
    run: str, images: Manifest, tmp_path: Path, threads: int
) -> None:
    report = maker(run, images, tmp_path, threads=threads).make(Part(7, 290))
    assert (report.rows, report.rejected) == (283, 0)
    table = read_part(str(tmp_path / Part(7, 290).name))
    decoded = [decode(row.image, Limits()) for row in real_rows(290)[7:]]
    expected = load_encoder(run).embed(decoded)  # type: ignore[arg-type]
    assert table["sample_id"].to_pylist() == list(range(7, 290))
    np.testing.assert_allclose(vectors_of(table), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_part_made_again_has_the_same_bytes(run: str, images: Manifest, tmp_path: Path) -> None:
    made = []
    for threads in (0, 2):
        (tmp_path / f"{threads}").mkdir()
        maker(run, images, tmp_path / f"{threads}", threads=threads).make(Part(0, ROWS))
        made.append((tmp_path / f"{threads}" / Part(0, ROWS).name).read_bytes())
    assert made[0] == made[1]


def test_half_precision_is_the_rounded_vector(run: str, images: Manifest, tmp_path: Path) -> None:
    part = Part(0, 64)
    for dtype in ("float16", "float32"):
        (tmp_path / dtype).mkdir()
        maker(run, images, tmp_path / dtype, dtype=dtype).make(part)
    half, whole = (read_part(str(tmp_path / dtype / part.name)) for dtype in ("float16", "float32"))
    assert half["vector"].type.value_type == pa.float16()
    assert (vectors_of(half) == vectors_of(whole).astype(np.float16)).all()


def test_a_vector_that_is_not_finite_names_its_image(run: str, images: Manifest, tmp_path: Path) -> None:
    broken = maker(run, images, tmp_path)
    with torch.no_grad():
        next(broken.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite as float32") as caught:
        broken.make(Part(5, 9))
    assert real_rows(6)[5].uri in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_loose_images_are_read_where_they_lie(local_ray: None, run: str, tmp_path: Path) -> None:
    from simclr_ray.data.index import IndexOptions, index

    for i, row in enumerate(real_rows(90)):
        (tmp_path / "photos" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / f"{i % 3}" / f"{i}.png").write_bytes(row.image)
    manifest = index(str(tmp_path / "photos"), str(tmp_path / "index"), IndexOptions(labels="folder")).manifest
    (tmp_path / "photos" / "0" / "0.png").unlink()
    report = maker(run, manifest, tmp_path).make(Part(0, 90))
    table = read_part(str(tmp_path / Part(0, 90).name))
    assert (report.rows, report.rejected) == (89, 1)
    found = look_at_part(str(tmp_path / Part(0, 90).name))
    assert found is not None
    assert found.note.rejected[0].uri.endswith("0/0.png")
    assert len(set(table["uri"].to_pylist())) == 89
    for one in table.select(["uri", "label"]).to_pylist():
        assert Path(one["uri"]).parent.name == manifest.classes[one["label"]]
