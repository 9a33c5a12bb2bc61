"""Duplicates: the hash is stable under what people do to pictures, and the tables find every pair."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from simclr_ray.data import duplicates
from simclr_ray.data.decode import Limits
from simclr_ray.data.duplicates import (
    find_duplicates,
    hash_of_bytes,
    perceptual_hash,
    popcount,
    same_bytes,
    same_picture,
)
from tests.conftest import real_rows

LIMITS = Limits()


def bits(one: int | None, other: int | None) -> int:
    assert one is not None
    assert other is not None
    return (one ^ other).bit_count()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.open(io.BytesIO(row.image)).convert("RGB") for row in real_rows(300)]


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


CHANGES = {
    "encoded at quality 85": lambda image: encoded(image, quality=85),
    "encoded at quality 60": lambda image: encoded(image, quality=60),
    "twice the size": lambda image: encoded(image.resize((56, 56), Image.Resampling.BICUBIC), quality=90),
    "twelve times the size": lambda image: encoded(image.resize((336, 336), Image.Resampling.LANCZOS), quality=90),
    "as PNG": lambda image: encoded(image, "PNG"),
    "brighter": lambda image: encoded(image.point(lambda level: min(255, level + 12)), "PNG"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_copy_is_near_and_other_pictures_are_not(pictures: list[Image.Image], change) -> None:
    """Pictures of 28 pixels, all of clothes: the hardest case for both halves of the law."""
    own = [hash_of_bytes(encoded(image, "PNG"), LIMITS) for image in pictures]
    near = [bits(one, hash_of_bytes(change(image), LIMITS)) for one, image in zip(own, pictures, strict=True)]
    assert np.percentile(near, 90) <= 6
    assert np.median(near) <= 2
    hashes = np.array(own, dtype=np.uint64)
    first, second = np.triu_indices(len(hashes), 1)
    others = popcount(hashes[first] ^ hashes[second])
    assert np.mean(others <= 6) < 1e-3
    assert np.median(others) > 24


def test_half_of_the_bits_are_set(pictures: list[Image.Image]) -> None:
    """They are those above the median."""
    for image in pictures[:20]:
        value = perceptual_hash(np.asarray(image))
        assert value is not None
        assert value.bit_count() == 32
        assert 0 <= value < 1 << 64


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_picture_without_texture_has_no_hash(level: int) -> None:
    flat = np.full((40, 60, 3), level, dtype=np.uint8)
    assert perceptual_hash(flat) is None
    noise = np.random.default_rng(0).integers(-2, 3, flat.shape)
    assert perceptual_hash(np.clip(flat + noise, 0, 255).astype(np.uint8)) is None


def test_what_does_not_decode_has_no_hash() -> None:
    assert hash_of_bytes(b"<!doctype html>", LIMITS) is None
    assert hash_of_bytes(b"", LIMITS) is None


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_popcount_is_pythons(words: list[int]) -> None:
    assert popcount(np.array(words, dtype=np.uint64)).tolist() == [word.bit_count() for word in words]


@st.composite
def hashes(draw: st.DrawFn) -> list[int]:
    """Some hashes and near copies of them, in any order."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6))
    out = []
    for centre in draw(st.lists(st.sampled_from(centres), max_size=40)):
        flips = draw(st.lists(st.integers(0, 63), max_size=7, unique=True))
        out.append(centre ^ sum(1 << bit for bit in flips))
    return out


def obvious(values: list[int], distance: int) -> tuple[list[int], list[int]]:
    """In order, each is dropped for the nearest of those that stay, if it is near enough; copies go with the first."""
    leader, apart = [], []
    for number, value in enumerate(values):
        first = values.index(value)
        if first < number:
            leader.append(leader[first])
            apart.append(apart[first])
            continue
        stays = [(bits(value, values[other]), other) for other in range(number) if leader[other] == other]
        near = [one for one in stays if one[0] <= distance]
        leader.append(min(near)[1] if near else number)
        apart.append(min(near)[0] if near else 0)
    return leader, apart


@given(hashes(), st.integers(0, 10), st.integers(0, 1 << 40))
@example([14, 0, 1, 0], 3, 0)
@settings(deadline=None)
def test_tables_find_what_comparing_all_pairs_finds(values: list[int], distance: int, many: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        tables = duplicates._tables
        patch.setattr(duplicates, "_tables", lambda count, distance: tables(count + many, distance))  # of longer keys
        leader, apart = same_picture(np.array(values, dtype=np.uint64), distance)
    assert (leader.tolist(), apart.tolist()) == obvious(values, distance)


@given(hashes(), st.integers(0, 10), st.data())
@settings(deadline=None)
def test_an_image_is_dropped_only_for_one_that_stays(values: list[int], distance: int, data: st.DataObject) -> None:
    count = len(values)
    contents = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    hashed = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=bool)
    # Equal bytes have equal hashes, and none or all of them one.
    first = [contents.index(content) for content in contents]
    digests = np.array([[content, content % 2] for content in contents], dtype=np.uint64).reshape(count, 2)
    marks = np.array([values[i] for i in first], dtype=np.uint64)
    hashed = hashed[first] if count else hashed
    found = find_duplicates(same_bytes(digests), marks, hashed, distance)
    dropped = set(found.dropped.tolist())
    assert found.dropped.tolist() == sorted(dropped)
    assert not dropped & set(found.kept.tolist())
    stays = [i for i in range(count) if i not in dropped]
    assert len({contents[i] for i in stays}) == len(stays), "no two of equal bytes stay"
    near = [(i, j) for i in stays for j in stays if i < j and hashed[i] and hashed[j]]
    assert all(bits(int(marks[i]), int(marks[j])) > distance for i, j in near)
    for one, kept, apart in zip(found.dropped, found.kept, found.distance, strict=True):
        assert kept < one, "the first stays"
        if contents[one] != contents[kept]:
            assert bits(int(marks[one]), int(marks[kept])) == apart <= distance
        else:
            assert apart == 0


def test_without_hashes_equal_bytes_alone_are_found() -> None:
    digests = np.array([[1, 1], [2, 1], [1, 1], [1, 2], [2, 1], [1, 1]], dtype=np.uint64)
    found = find_duplicates(same_bytes(digests), None, np.zeros(6, dtype=bool), 4)
    assert (found.dropped.tolist(), found.kept.tolist()) == ([2, 4, 5], [0, 1, 0])


def test_tables_of_many_hashes_have_keys_that_few_share() -> None:
    few, many = (duplicates._tables(count, 4) for count in (1_000, 10**9))
    assert len(few) <= len(many)
    assert min(int(mask).bit_count() for mask in many) >= 26
    for tables in (few, many):
        assert all(any(not int(mask) & sum(1 << bit for bit in flips) for mask in tables)
                   for flips in np.random.default_rng(0).integers(0, 64, (200, 4)).tolist())  # fmt: skip
