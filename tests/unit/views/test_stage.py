"""Laws of the stage: R rows in, R rows out, and a rejected row is replaced by a rule that knows the unit alone."""

from __future__ import annotations

import io
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simclr_ray.data.decode import REASONS, Decoded, Limits, Rejected, decode, decode_reduced, read_header
from simclr_ray.errors import DataError
from simclr_ray.views import apply, stage
from simclr_ray.views.draw import Draws, draw
from simclr_ray.views.policy import preset
from simclr_ray.views.stage import ViewStage, replacements, wanted_reductions
from tests.unit.views.images import natural

STAGE = ViewStage(preset("cifar", size=16), seed=3, limits=Limits())


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def unit(images: list[bytes], ids: list[int], epoch: int = 0) -> dict[str, np.ndarray]:
    n = len(images)
    column = np.empty(n, dtype=object)
    column[:] = images
    return {
        "image": column,
        "sample_id": np.array(ids),
        "unit": np.full(n, 5),
        "epoch": np.full(n, epoch),
    }


def test_views_of_a_sample_do_not_depend_on_its_place_or_company() -> None:
    images = [png(i) for i in range(6)]
    whole = STAGE(unit(images, list(range(6))))
    mixed = STAGE(unit([images[i] for i in (4, 0, 2)], [4, 0, 2]))
    assert whole["views"].shape == (6, 2, 16, 16, 3)
    assert np.array_equal(mixed["views"], whole["views"][[4, 0, 2]])
    assert (whole["rejected_id"] == -1).all()


def test_units_of_a_block_are_made_as_if_each_came_alone() -> None:
    """A rejected row is replaced by one of its own unit."""
    first = unit([png(0), b"broken", png(2)], [0, 1, 2])
    second = unit([png(3), png(4), b"broken"], [3, 4, 5]) | {"unit": np.full(3, 6)}
    block = STAGE({name: np.concatenate([first[name], second[name]]) for name in first})
    alone = [STAGE(first), STAGE(second)]
    assert block.keys() == alone[0].keys()
    for name, column in block.items():
        assert np.array_equal(column, np.concatenate([one[name] for one in alone])), name
        assert column.dtype == alone[0][name].dtype


def test_views_differ_between_the_two_and_between_epochs() -> None:
    images = [png(0)]
    first, second = (STAGE(unit(images, [0], epoch))["views"] for epoch in (0, 1))
    assert not np.array_equal(first[:, 0], first[:, 1])
    assert not np.array_equal(first, second)


def test_a_rejected_row_is_replaced_by_the_next_one_in_views_of_its_own() -> None:
    images = [png(0), b"<html>", png(2), b"", png(4)]
    out = STAGE(unit(images, [10, 11, 12, 13, 14]))
    assert out["sample_id"].tolist() == [10, 12, 12, 14, 14]
    assert out["rejected_id"].tolist() == [-1, 11, -1, 13, -1]
    assert [REASONS[code] for code in out["reason"][[1, 3]]] == ["not_an_image", "empty"]
    assert not np.array_equal(out["views"][1], out["views"][2])
    clean = STAGE(unit([png(0), png(2), png(4)], [10, 12, 14]))
    assert np.array_equal(out["views"][[0, 2, 4]], clean["views"])


def test_a_unit_that_stands_in_for_a_lost_one_has_views_of_its_own() -> None:
    """Its earlier uses are counted on, also for a row that is replaced; what is reported are the lost images."""
    images, ids = [png(0), b"<html>", png(2), png(3)], [10, 11, 12, 13]
    lost = {"lost_id": np.array([20, 21, -1, 23]), "lost_reason": np.array([10, 11, -1, 10], dtype=np.int8)}
    out = STAGE(unit(images, ids) | {"use": np.full(4, 64)} | lost)
    assert out["sample_id"].tolist() == [10, 12, 12, 13]
    assert out["use"].tolist() == [64, 65, 64, 64]
    assert out["rejected_id"].tolist() == [20, 21, -1, 23]
    assert [REASONS[code] for code in out["reason"][[0, 1, 3]]] == [
        "shard_missing",
        "shard_unreadable",
        "shard_missing",
    ]
    own = STAGE(unit(images, ids))
    for place, (sample, use) in enumerate(zip(out["sample_id"], out["use"], strict=True)):
        pixels = decode(images[ids.index(sample)], Limits())
        drawn = draw(
            STAGE.policy, seed=3, epoch=0, sample_ids=np.array([sample]), sizes=np.array([pixels.shape[:2]]),
            views=2 * use + 2,
        )[:, -2:]  # fmt: skip
        assert np.array_equal(out["views"][place], apply.two_views([pixels], drawn, STAGE.policy)[0])
        assert not np.array_equal(out["views"][place], own["views"][place])


def test_a_row_that_was_lost_with_its_shard_is_told_so() -> None:
    out = STAGE(
        unit([png(0), None, png(2)], [10, 11, 12])
        | {"lost_id": np.array([-1, 11, -1]), "lost_reason": np.array([-1, 10, -1], dtype=np.int8)}
    )
    assert out["rejected_id"].tolist() == [-1, 11, -1]
    assert REASONS[out["reason"][1]] == "shard_missing"
    assert out["sample_id"].tolist() == [10, 12, 12]


def test_images_of_several_frames_are_told_where_they_are_used() -> None:
    frames = [Image.new("L", (20, 24), level) for level in (0, 99)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    out = STAGE(unit([png(0), stream.getvalue(), png(2), b"junk"], [10, 11, 12, 13]))
    assert out["animated"].tolist() == [False, True, False, False]
    out = STAGE(unit([b"", stream.getvalue(), png(2)], [10, 11, 12]))
    assert out["animated"].tolist() == [True, True, False]  # it stands for the rejected one too
    with_limits = ViewStage(STAGE.policy, STAGE.seed, Limits(animated="reject"))
    assert not with_limits(unit([png(0), stream.getvalue()], [10, 11]))["animated"].any()


def test_large_images_are_taken_some_at_a_time_and_small_ones_together(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [png(i) for i in range(9)]  # 1440 bytes each, decoded
    expected = STAGE(unit(images, list(range(9))))
    for room in (1, 1440, 4000, 10_000):
        monkeypatch.setattr(stage, "_BYTES_AT_ONCE", room)
        out = STAGE(unit(images, list(range(9))))
        assert all(np.array_equal(out[name], expected[name]) for name in expected)


def test_an_image_that_breaks_in_its_pixels_is_replaced_as_one_that_breaks_in_its_header() -> None:
    cut = png(1)[:-40]
    out = STAGE(unit([png(0), cut, png(2)], [10, 11, 12]))
    assert out["rejected_id"].tolist() == [-1, 11, -1]
    assert REASONS[out["reason"][1]] == "truncated"
    assert out["sample_id"].tolist() == [10, 12, 12]
    assert out["use"].tolist() == [0, 1, 0]


def test_a_file_that_asks_for_absurd_memory_is_rejected_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("simclr_ray.data.decode._by_pillow", fail)
    with pytest.raises(DataError, match="too_large"):
        STAGE(unit([png(0), png(1)], [0, 1]))


def test_an_image_that_decodes_once_only_is_an_error_and_never_a_view_of_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def moody(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) > 2:
            return Rejected("corrupt", "the third time")
        return decode_reduced(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "decode_reduced", moody)
    with pytest.raises(DataError, match="decoded once and not again"):
        STAGE(unit([png(0), b"junk", png(2)], [0, 1, 2]))


def test_later_uses_are_drawn_as_if_all_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = preset("imagenet-broad", size=16)
    n, use = 6, np.array([0, 3, 0, 1, 0, 0])
    ids, sizes, epochs = np.arange(n) + 5, np.full((n, 2), 40), np.arange(n)
    got = stage.draws_at(policy, seed=1, epoch=epochs, sample_ids=ids, sizes=sizes, use=use)
    everything = draw(policy, seed=1, epoch=epochs, sample_ids=ids, sizes=sizes, views=8)
    for row, c in enumerate(use):
        for view in (0, 1):
            for field in fields(Draws):
                one, other = (getattr(d, field.name) for d in (got, everything))
                assert np.array_equal(one[row, view], other[row, 2 * c + view])


def test_a_unit_without_any_image_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match="none of the 2 images of unit 5"):
        STAGE(unit([b"", b"x"], [0, 1]))


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
def test_replacement_is_the_next_accepted_row_around_the_end_and_no_use_repeats(accepted: list[bool]) -> None:
    source, use = replacements(np.array(accepted))
    for place in range(len(accepted)):
        ahead = next(i % len(accepted) for i in range(place, 2 * len(accepted)) if accepted[i % len(accepted)])
        assert source[place] == ahead
    assert len(set(zip(source.tolist(), use.tolist(), strict=True))) == len(accepted)
    assert (use[np.array(accepted)] == 0).all()


# --- scaled decode --------------------------------------------------------------------------------------------------

SCALED = ViewStage(preset("imagenet", size=48), seed=5, limits=Limits())
FULL = replace(SCALED, scaled_decode=False)


def jpeg(number: int, height: int = 320, width: int = 416, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(natural(height, width, number)).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def draws_of(images: list[bytes], use: int = 0) -> Draws:
    sizes = np.array([(header.height, header.width) for header in (read_header(data, Limits()) for data in images)])
    ids = np.arange(len(images))
    return stage.draws_at(
        SCALED.policy, seed=SCALED.seed, epoch=ids * 0, sample_ids=ids, sizes=sizes, use=ids * 0 + use
    )


def test_without_scaled_decode_views_are_those_of_the_whole_image() -> None:
    images = [jpeg(i) for i in range(6)]
    pixels = [decode(data, Limits()) for data in images]
    expected = stage.two_views(pixels, draws_of(images), SCALED.policy)
    assert np.array_equal(FULL(unit(images, list(range(6))))["views"], expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"height": 333, "width": 413}, {"subsampling": "4:4:4"}, {"exif": turned(6)}, {"exif": turned(3)}],
    ids=["4:2:0", "odd sides", "4:4:4", "turned", "upside down"],
)
def test_crops_of_a_scaled_decode_are_nearly_those_of_the_whole_image(options: dict[str, object]) -> None:
    n = 24
    images = [jpeg(i, **options) for i in range(n)]  # type: ignore[arg-type]
    scaled, full = (replace(s, where="gpu")(unit(images, list(range(n))))["views"] for s in (SCALED, FULL))
    wanted = np.array(wanted_reductions(draws_of(images), SCALED.policy))
    assert {1, 2} <= set(wanted.tolist())
    distance = np.abs(scaled.astype(int) - full).mean(axis=(2, 3, 4))  # (n, 2)
    assert (distance[wanted == 1] == 0).all()
    assert (distance[wanted > 1] > 0).all()
    assert distance[wanted > 1].mean() <= 0.63
    assert distance.max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"exif": turned(8), "height": 325, "width": 413},  # whose blocks would start outside
        {"progressive": True},
    ],
)
def test_what_cannot_be_decoded_at_a_scale_is_decoded_whole(options: dict[str, object]) -> None:
    images = [jpeg(i, **options) for i in range(8)]  # type: ignore[arg-type]
    images += [data[:-2] + bytes(10) + data[-2:] for data in map(jpeg, range(4))]  # Pillow has the last word on these
    assert max(wanted_reductions(draws_of(images), SCALED.policy)) > 1
    assert np.array_equal(SCALED(unit(images, list(range(12))))["views"], FULL(unit(images, list(range(12))))["views"])


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 300), st.integers(0, 2**32))
def test_no_crop_is_enlarged_because_of_a_scaled_decode(height: int, width: int, size: int, seed: int) -> None:
    policy = preset("imagenet", size=size)
    d = draw(policy, seed=seed, epoch=0, sample_ids=np.arange(4), sizes=np.tile([height, width], (4, 1)))
    for row, factor in enumerate(wanted_reductions(d, policy)):
        assert factor == 1 or min(d.height[row].min(), d.width[row].min()) >= factor * size


def test_flavour_paper_never_decodes_at_a_scale() -> None:
    images = [jpeg(i) for i in range(6)]
    scaled, full = (
        replace(s, policy=preset("imagenet", flavour="paper", size=48))(unit(images, list(range(6))))["views"]
        for s in (SCALED, FULL)
    )
    assert np.array_equal(scaled, full)


def test_a_replacement_is_scaled_by_its_own_crops() -> None:
    scales = [wanted_reductions(draws_of([jpeg(i) for i in range(9)], use), SCALED.policy) for use in (0, 1)]
    row = next(i for i in range(9) if scales[0][i] < scales[1][i])
    images: list[bytes] = [jpeg(i) for i in range(9)]
    images[row - 1] = b""
    out = SCALED(unit(images, list(range(9))))
    assert (out["sample_id"][row - 1], out["use"][row - 1]) == (row, 1)
    d = draws_of([jpeg(i) for i in range(9)], 1)[row : row + 1]
    header = read_header(images[row], Limits())
    decoded = decode_reduced(images[row], header, Limits(), reduction=scales[1][row])
    assert decoded.reduction == scales[1][row]
    assert np.array_equal(out["views"][row - 1], stage.two_views([decoded], d, SCALED.policy)[0])


def test_reduced_images_take_as_much_of_the_memory_as_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [jpeg(i) for i in range(12)]
    d = draws_of(images)
    wanted = wanted_reductions(d, SCALED.policy)
    needed = sum(3 * (320 // f) * (416 // f) for f in wanted)
    expected = SCALED(unit(images, list(range(12))))
    calls = []

    def counted(decoded: list[object], *rest: object) -> object:
        calls.append(len(decoded))
        return apply.two_views(decoded, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "two_views", counted)
    for room, groups in ((needed, 1), (needed - 1, 2), (1, 12)):
        calls.clear()
        monkeypatch.setattr(stage, "_BYTES_AT_ONCE", room)
        views = SCALED(unit(images, list(range(12))))["views"]
        assert len(calls) == groups
        assert sum(calls) == 12
        assert (views != expected["views"]).mean() < 1e-3  # by torch


def test_large_images_are_decoded_one_after_another_into_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [(320, 416), (800, 1024), (768, 1024), (320, 416), (900, 1024)]
    assert stage._BYTES_AT_ONCE < 3 * 768 * 1024
    images = [jpeg(i, *size) for i, size in enumerate(sides)]
    expected = FULL(unit(images, list(range(5))))["views"]
    starts, groups = [], []

    def watched(decoded: list[Decoded], *rest: object) -> object:
        starts.extend(one.pixels.__array_interface__["data"][0] for one in decoded)
        groups.append(len(decoded))
        return two_views(decoded, *rest)  # type: ignore[arg-type]

    two_views = stage.two_views
    monkeypatch.setattr(stage, "two_views", watched)
    assert np.array_equal(FULL(unit(images, list(range(5))))["views"], expected)
    assert groups == [1, 1, 1, 1, 1]
    assert len(set(starts)) == 1
    starts.clear()
    monkeypatch.setattr(stage, "_MOST_BYTES", 3 * 800 * 1024)  # the last one is beyond
    assert np.array_equal(FULL(unit(images, list(range(5))))["views"], expected)
    assert len(set(starts[:4])) == 1
    assert starts[4] != starts[0]


@pytest.mark.parametrize("scaled_decode", [True, False])
def test_crops_for_the_gpu_become_the_same_views(scaled_decode: bool) -> None:
    images = [jpeg(i) for i in range(8)]
    finished, crops = (
        replace(SCALED, scaled_decode=scaled_decode, where=where)(unit(images, list(range(8))))["views"]
        for where in ("cpu", "gpu")
    )
    colours = apply.colour(torch.from_numpy(crops).flatten(0, 1), draws_of(images).flatten(), SCALED.policy)
    difference = np.abs(colours.numpy().reshape(finished.shape).astype(int) - finished)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3
