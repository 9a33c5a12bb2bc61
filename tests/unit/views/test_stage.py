"""Laws of the stage: R rows in, R rows out, and a rejected row is replaced by a rule that knows the unit alone."""

from __future__ import annotations

import io
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simclr_ray.data.decode import REASONS, Limits, Rejected, decode_reduced
from simclr_ray.errors import DataError
from simclr_ray.views import stage
from simclr_ray.views.draw import Draws, draw
from simclr_ray.views.policy import preset
from simclr_ray.views.stage import ViewStage, replacements

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
