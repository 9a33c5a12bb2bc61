"""The pictures of a report: views, the map of embeddings with its thumbnails, and nearest neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from simclr_ray import storage
from simclr_ray.config import Config
from simclr_ray.errors import SimclrError
from simclr_ray.evaluate.encode import load_encoder
from simclr_ray.evaluate.preview import first_views
from simclr_ray.publish.charts import Axis, Series, line_chart, scatter
from simclr_ray.publish.looks import UMAP_NEIGHBOURS, Look, encoded, look_at, sample_of, sprite
from simclr_ray.publish.page import as_json, picture, words
from simclr_ray.publish.record import RunRecord

VIEWS_SHOWN = 12
SIDE = 160
"""Longest side of a picture on the page."""
CELL, COLUMNS = 32, 32
PAINTS = 10
"""Classes with a colour of their own; further ones are gray."""


def views_section(record: RunRecord) -> Mapping[str, Any]:
    """Images beside the two views that training made of them, and what was drawn."""
    if record.config is None or not record.config.data.train:
        return {"why": "The run's settings cannot be read.", "shown": []}
    try:
        seen = first_views(record.config, VIEWS_SHOWN)
    except SimclrError as error:
        return {"why": f"The training images are not to be had: {error}", "shown": []}
    shown = []
    for one in seen:
        named = (("image", one.image), ("view a", one.views[0]), ("view b", one.views[1]))
        shown.append({
            "pictures": [
                {"name": name, "image": picture(encoded(pixels, SIDE), f"{one.words[0]}: {name}",
                                                small=max(pixels.shape[:2]) <= 64)}
                for name, pixels in named
            ],
            "words": one.words,
        })  # fmt: skip
    return {"why": "", "shown": shown}


def look_section(record: RunRecord, count: int, *, images: bool, umap: bool = False) -> Mapping[str, Any]:
    """Map, spectrum and neighbours of a sample under the newest checkpoint.

    Raises:
        SimclrError: no checkpoint yet, or the images are not to be had.
    """
    assert isinstance(record.config, Config)
    encoder = load_encoder(record.uri)
    look = look_at(encoder, sample_of(record.config, encoder.policy, count), umap=umap)
    sample = look.sample
    labels = sample.labels or ()
    counted = Counter(labels)
    about = (
        f"{len(sample.ids):,} of {sample.of:,} images of {storage.tellable(sample.source)}, embedded by the checkpoint "
        f"of step {look.step:,}: RankMe {look.rankme:.1f} of at most {min(len(sample.ids), len(look.spectrum))}, "
        f"alignment {look.alignment:.3f}, uniformity {look.uniformity:.3f} (of this sample; the table above is of the "
        "whole test set)."
    )
    return {
        "why": "",
        "about": about,
        "maps": _maps(look),
        "data": as_json({
            "classes": list(labels), "words": [_words(look, row) for row in range(len(sample.ids))],
            "cell": CELL, "columns": COLUMNS,
        }),
        "classes": [
            {"number": number, "name": sample.class_name(number), "count": counted[number], "paint": _paint(number)}
            for number in sorted(counted)
        ],
        "sprite": picture(sprite(sample.views, CELL, COLUMNS), "", name="sprite") if images else "",
        "spectrum": _spectrum(look),
        "gallery": _gallery(look) if images else [],
        "gallery_about": _about_gallery(look),
    }  # fmt: skip


def _maps(look: Look) -> list[Mapping[str, Any]]:
    """Components 1 and 2, 3 and 4 where there are so many, and UMAP's where it was asked for."""
    maps: list[Mapping[str, Any]] = []
    for first in range(0, look.components.shape[1] - 1, 2):
        a, b = look.variance[first : first + 2]
        name = f"{first + 1} and {first + 2}"
        maps.append({"name": f"components {name}", "chart": _map(
            look, look.components[:, first : first + 2],
            title=f"Principal components {name} of normalised embeddings",
            x_title=f"component {first + 1} ({a:.0%} of the variance)", y_title=f"component {first + 2} ({b:.0%})",
        )})  # fmt: skip
    if look.umap is not None:
        title = f"UMAP of the embeddings by cosine, {UMAP_NEIGHBOURS} neighbours: what lies together is alike"
        chart = _map(
            look, look.umap, title=title, x_title="distances between groups, and axes, mean nothing", y_title=""
        )
        maps.append({"name": "UMAP", "chart": chart})
    return maps


def _map(look: Look, places: npt.NDArray[np.float64], *, title: str, x_title: str, y_title: str) -> Markup:
    labels = look.sample.labels or [-1] * len(places)
    points = [
        (float(a), float(b), label if 0 <= label < PAINTS else -1) for (a, b), label in zip(places, labels, strict=True)
    ]
    return scatter(
        points, title=title, x_title=x_title, y_title=y_title, summary=f"{len(points)} embeddings",
        tips=[words(_words(look, row)) for row in range(len(points))],
    )  # fmt: skip


def _spectrum(look: Look) -> Markup:
    """Singular values: a cliff after a few is a collapse to so many directions."""
    directions = [float(i) for i in range(1, len(look.spectrum) + 1)]
    series = Series("singular value, relative to the first", directions, [max(v, 1e-6) for v in look.spectrum])
    return line_chart(
        [series], title="Directions in use: singular values of the embeddings",
        x=Axis("direction", low=1.0, high=float(max(2, len(directions)))), y=Axis("relative to the first", log=True),
    )  # fmt: skip


def _gallery(look: Look) -> list[list[Mapping[str, Any]]]:
    rows: list[list[Mapping[str, Any]]] = []
    sample = look.sample
    for query, found, near in zip(look.queries, look.neighbours, look.similarity, strict=True):
        row = [_cell(look, query, "query", _class(look, query) or f"image {sample.ids[query]}")]
        for other, similarity in zip(found.tolist(), near.tolist(), strict=True):
            kind = "plain"
            if sample.labels is not None:
                kind = "same" if sample.labels[other] == sample.labels[query] else "other"
            row.append(_cell(look, other, kind, f"{similarity:.2f} {_class(look, other)}".strip()))
        rows.append(row)
    return rows


def _cell(look: Look, row: int, kind: str, text: str) -> Mapping[str, Any]:
    pixels = look.sample.views[row]
    image = picture(encoded(pixels, SIDE), _words(look, row), small=max(pixels.shape[:2]) <= 64)
    return {"kind": kind, "image": image, "words": text}


def _about_gallery(look: Look) -> str:
    text = (
        f"The first image at the left, then the nearest of the same {len(look.sample.ids):,} images by cosine "
        "similarity of embeddings. "
    )
    if look.sample.labels is None:
        return text + "Nobody chose these queries: they are the first of the run's order."
    hits = [
        look.sample.labels[other] == look.sample.labels[query]
        for query, found in zip(look.queries, look.neighbours, strict=True)
        for other in found.tolist()
    ]
    return text + (
        f"Queries are the first image of each class. Solid frame: same class; dashed: another ({sum(hits)} of "
        f"{len(hits)} neighbours are of the query's class)."
    )


def _words(look: Look, row: int) -> str:
    """What a point is."""
    name = _class(look, row)
    return f"image {look.sample.ids[row]}" + (f", {name}" if name else "")


def _class(look: Look, row: int) -> str:
    return look.sample.class_name(look.sample.labels[row]) if look.sample.labels is not None else ""


def _paint(label: int) -> str:
    return f"p{label}" if 0 <= label < PAINTS else "none"
