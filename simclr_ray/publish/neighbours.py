"""The verb `neighbours`: the images of an embedding that are most similar to one, exactly.

faiss goes over the files one after another and the best of each are merged, so memory is that of one file and the
query, and the answer is that of comparing with every vector. It is faiss and not DuckDB because files are read by our
storage layer, with its credentials and retries, because nothing of a user's becomes part of a query language, and
because its products run in all threads.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from simclr_ray import storage
from simclr_ray.data.decode import Rejected, decode
from simclr_ray.data.units import BYTES_AHEAD, read_ahead
from simclr_ray.errors import ConfigError, DataError, StorageError
from simclr_ray.evaluate.encode import load_encoder
from simclr_ray.publish.embed_folder import read_embedding, weights_digest
from simclr_ray.publish.parts import read_part, vectors_of
from simclr_ray.train.derive import limits_of
from simclr_ray.train.run import open_existing

Vectors = npt.NDArray[np.float32]


class Neighbour(NamedTuple):
    """An image near the query."""

    similarity: float
    """Cosine, -1 to 1."""
    sample_id: int
    uri: str
    label: int | None


def neighbours(
    folder: str, *, image: str | None = None, sample_id: int | None = None, k: int = 10, run: str | None = None
) -> list[Neighbour]:
    """The k most similar images of an embedding, most similar first; equal ones by id, as far as k reaches.

    Args:
        folder: A finished embedding.
        image: URI of an image file to look for. Give this or `sample_id`.
        sample_id: An image of the embedding to look for; it is not among its own neighbours.
        k: How many; fewer where the embedding has fewer.
        run: Run folder of the encoder, where it is not at the place any more at which the embedding was made.

    Raises:
        ConfigError: not one query, k below 1, faiss is not installed, or the encoder is another one.
        DataError: no finished embedding, none of an image, no such id, or the image does not decode.
        StorageError: a store fails, or the run has lost the checkpoint.
    """
    if (image is None) == (sample_id is None):
        raise ConfigError("give one query", expected="--image FILE or --id N")
    if k < 1:
        raise ConfigError("no neighbours asked for", where="k", got=k, expected="1 or more")
    faiss = _faiss()
    folder = storage.normalise(folder)
    numbers = read_embedding(folder)
    if not numbers["rows"]:
        raise DataError("the embedding holds no image", where=folder, fix="see rejected.parquet there")
    query = (
        _image_vector(numbers, image, run)
        if image is not None
        else _stored_vector(folder, numbers, int(sample_id or 0))
    )
    found = list[Neighbour]()
    for table in _files(folder, numbers):
        found = sorted([*found, *_nearest(faiss, table, query, k, without=sample_id)], key=_order)[:k]
    return found


def _order(one: Neighbour) -> tuple[float, int]:
    return -one.similarity, one.sample_id


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise ConfigError(
            "searching neighbours needs faiss", fix="install it with: pip install 'simclr-ray[neighbours]'"
        ) from None


def _files(folder: str, numbers: dict[str, Any]) -> Iterator[Any]:
    """The tables of an embedding, the next ones read ahead."""
    return read_ahead(
        numbers["files"], lambda file: read_part(storage.join(folder, file["name"])),
        cost=lambda file: int(file["bytes"]), max_cost=BYTES_AHEAD,
    )  # fmt: skip


def _nearest(faiss: Any, table: Any, query: Vectors, k: int, *, without: int | None) -> list[Neighbour]:
    vectors = _unit(vectors_of(table))
    if not len(vectors):
        return []
    wanted = min(len(vectors), k if without is None else k + 1)
    similarity, rows = faiss.knn(query[None], vectors, wanted, metric=faiss.METRIC_INNER_PRODUCT)
    chosen = table.take(rows[0])
    labels = chosen["label"].to_pylist() if "label" in table.column_names else [None] * wanted
    columns = similarity[0].tolist(), chosen["sample_id"].to_pylist(), chosen["uri"].to_pylist(), labels
    found = [Neighbour(*one) for one in zip(*columns, strict=True)]
    return [one for one in found if one.sample_id != without]


def _unit(vectors: Vectors) -> Vectors:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Vectors = np.ascontiguousarray(vectors / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float32)
    return unit


def _stored_vector(folder: str, numbers: dict[str, Any], sample_id: int) -> Vectors:
    for file in numbers["files"]:
        if file["first"] <= sample_id < file["stop"]:
            table = read_part(storage.join(folder, file["name"]), ["sample_id", "vector"])
            rows = np.flatnonzero(table["sample_id"].to_numpy() == sample_id)
            if len(rows):
                return _unit(vectors_of(table)[int(rows[0])])
    images = numbers["identity"]["images"]
    raise DataError(
        "no vector of this id", where=folder, got=sample_id,
        expected=f"0 to {images - 1}, and not one of those in rejected.parquet",
    )  # fmt: skip


def _image_vector(numbers: dict[str, Any], image: str, run: str | None) -> Vectors:
    """The query's embedding, by the encoder that made the others."""
    place = run or numbers["run"]
    trained = load_encoder(place, numbers["step"])
    if weights_digest(trained.model.encoder) != numbers["identity"]["encoder"]:
        raise ConfigError("another encoder made this embedding", where=place, fix="give its run folder with --run")
    uri = str(Path(image).absolute()) if storage.is_local(image) else image
    try:
        encoded = storage.read_bytes(uri)
    except FileNotFoundError:
        raise StorageError("no image here", where=storage.tellable(uri)) from None
    pixels = decode(encoded, limits_of(open_existing(place)[1].data))
    if isinstance(pixels, Rejected):
        raise DataError(f"the image does not decode: {pixels.reason}", where=storage.tellable(uri), got=pixels.detail)
    return _unit(trained.embed([pixels]).numpy()[0])
