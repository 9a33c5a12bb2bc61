"""The preview shows what training will see, and says what was drawn for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from simclr_ray import preview
from simclr_ray.data.decode import Limits, decode
from simclr_ray.data.manifest import Manifest
from simclr_ray.data.plan import Plan, UnitTable
from simclr_ray.data.shards import ImageRow
from simclr_ray.data.units import plan_tasks, read_task
from simclr_ray.errors import ConfigError
from simclr_ray.evaluate import preview as module
from simclr_ray.evaluate.pictures import views_sheet
from simclr_ray.evaluate.preview import describe
from simclr_ray.views.draw import draw
from simclr_ray.views.policy import preset
from simclr_ray.views.stage import ViewStage
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


class Sheet(NamedTuple):
    """What was drawn."""

    originals: list[np.ndarray]
    views: np.ndarray


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[Sheet]:
    """Every sheet that is drawn from here on."""
    drawn: list[Sheet] = []

    def watched(originals: list[np.ndarray], views: np.ndarray, *rest: Any, **options: Any) -> None:
        drawn.append(Sheet(originals, views))
        views_sheet(originals, views, *rest, **options)

    monkeypatch.setattr(module, "views_sheet", watched)
    return drawn


def trained_on(manifest: Manifest, stage: ViewStage, units: int) -> dict[str, np.ndarray]:
    """The first units as the stream makes them."""
    [task] = plan_tasks(manifest, Plan(UnitTable(manifest), stage.seed), 0, units, units, stage.limits)
    made = [
        stage.columns({name: rows[name].to_numpy(zero_copy_only=False) for name in rows.column_names})
        for rows in read_task(task)
    ]
    return {name: np.concatenate([unit[name] for unit in made]) for name in made[0]}


def test_the_sheet_shows_the_views_that_training_sees_beside_their_images(
    data_set: Manifest, tmp_path: Path, sheets: list[Sheet]
) -> None:
    config = {"data": {"train": data_set.folder}, "views": {"preset": "cifar", "size": 16}, "run": {"seed": 3}}
    lines = preview(config, output=str(tmp_path / "views.png"), images=20)
    seen = trained_on(data_set, ViewStage(preset("cifar", size=16), 3, Limits()), units=2)
    [sheet] = sheets
    assert np.array_equal(sheet.views, seen["views"][:20])
    stored, ids = real_rows(400), seen["sample_id"][:20].tolist()
    for image, sample_id in zip(sheet.originals, ids, strict=True):
        assert np.array_equal(image, decode(stored[sample_id].image, Limits()))
    assert [line.split(":")[0] for line in lines if line.startswith("image")] == [f"image {one}" for one in ids]


def test_where_a_unit_is_lost_the_sheet_shows_what_stands_in_for_it(tmp_path: Path, sheets: list[Sheet]) -> None:
    manifest = make_data_set(tmp_path / "data", real_rows(64), shard_rows=16)  # a shard a unit
    config = {"data": {"train": manifest.folder}, "views": {"preset": "cifar", "size": 16}, "run": {"seed": 1}}
    stage = ViewStage(preset("cifar", size=16), 1, Limits())
    whole = trained_on(manifest, stage, units=2)
    (tmp_path / "data" / manifest.shards[int(whole["sample_id"][0]) // 16].uri).unlink()
    lines = preview(config, output=str(tmp_path / "views.png"), images=32)
    [sheet] = sheets
    assert np.array_equal(sheet.views, trained_on(manifest, stage, units=2)["views"])
    assert np.array_equal(sheet.views[16:], whole["views"][16:])
    assert not np.array_equal(sheet.views[:16], sheet.views[16:])  # the same images in views of their own
    heads = [line for line in lines if line.startswith("image ")]
    for place, (lost, shown) in enumerate(zip(whole["sample_id"][:16], whole["sample_id"][16:], strict=True)):
        assert heads[place].startswith(f"image {shown}: ")
        assert heads[place].endswith(f", instead of image {lost}, rejected as shard_missing")
        assert heads[16 + place] == f"image {shown}: 28 x 28 pixels"


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
