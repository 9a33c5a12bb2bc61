"""The preview shows what training will see, and says what was drawn for it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_ray import preview
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.shards import ImageRow
from simclr_ray.errors import ConfigError
from simclr_ray.evaluate.preview import describe
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import preset
from tests.conftest import make_data_set, real_rows


def test_a_sheet_and_a_line_for_each_view(data_set: Manifest, tmp_path: Path) -> None:
    config = {"data": {"train": data_set.folder}, "views": {"preset": "cifar", "size": 16}, "run": {"seed": 3}}
    lines = preview(config, output=str(tmp_path / "views.png"), images=20)  # more than one unit of 16
    with Image.open(tmp_path / "views.png") as picture:
        assert min(picture.size) > 200
    heads = [line for line in lines if line.startswith("image ")]
    assert len(heads) == 20
    assert all(line.endswith("28 x 28 pixels") for line in heads)
    assert len(lines) == 60
    assert preview(config, output=str(tmp_path / "again.png"), images=20) == lines
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "views.png").read_bytes()


def test_an_image_that_stands_in_for_a_rejected_one_says_so_beside_its_row(tmp_path: Path) -> None:
    broken = {3: b"", 4: b"<html>"}
    rows = [ImageRow(broken.get(i, row.image), row.label, row.uri) for i, row in enumerate(real_rows(16))]
    manifest = make_data_set(tmp_path / "data", rows)
    config = {"data": {"train": manifest.folder}, "views": {"preset": "cifar", "size": 16}}
    lines = preview(config, output=str(tmp_path / "views.png"), images=16)
    row = re.compile(r"image (\d+): 28 x 28 pixels(?:, instead of image (\d+), rejected as (\w+))?$")
    heads = [match.groups() for line in lines if (match := row.match(line))]
    assert {int(bad): reason for _, bad, reason in heads if bad} == {3: "empty", 4: "not_an_image"}
    planned = [int(bad or shown) for shown, bad, _ in heads]
    assert sorted(planned) == list(range(16))
    for place, (shown, _, _) in enumerate(heads):
        following = (planned[i % 16] for i in range(place, place + 16))
        assert int(shown) == next(image for image in following if image not in broken)
    words = [line.partition(": ")[2] for line in lines if line.startswith("  view ")]
    assert len(set(words)) == 32  # each use of an image has views of its own


def test_the_words_are_the_draws() -> None:
    policy = preset("imagenet-broad")
    draws = draw(policy, seed=1, epoch=0, sample_ids=np.arange(200), sizes=np.full((200, 2), 300))
    for row in range(200):
        _, *views = describe(row, (300, 300), draws[row : row + 1], policy)
        for view, text in enumerate(views):
            one = draws[row, view]
            assert re.search(rf"crop {one.width} x {one.height} at {one.left}, {one.top} ", text)
            for word, drawn in (
                ("mirrored", one.flip), ("brightness", one.jitter), ("hue", one.jitter), ("gray", one.grayscale),
                ("blur", one.blur), ("solarized", one.solarize),
            ):  # fmt: skip
                assert (word in text) == bool(drawn), (word, text)
            if one.jitter:
                names = ("brightness", "contrast", "saturation", "hue")
                assert [names[number] for number in one.order] == sorted(names, key=text.index)


@pytest.mark.parametrize(("changes", "images", "words"), [([], 12, "data.train must be set"), ([], 65, "1 to 64")])
def test_what_cannot_be_shown(changes: list[str], images: int, words: str, data_set: Manifest) -> None:
    config = {} if "set" in words else {"data": {"train": data_set.folder}}
    with pytest.raises(ConfigError, match=words):
        preview(config, changes, images=images)
