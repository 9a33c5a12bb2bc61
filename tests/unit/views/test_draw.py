from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simclr_ray.errors import ConfigError
from simclr_ray.philox import key_of, philox4x32, uniforms
from simclr_ray.views.draw import Draws, draw
from simclr_ray.views.policy import Policy, preset

N = 20_000
POLICY = preset("imagenet")
PAPER = preset("imagenet", flavour="paper")
BROAD = {flavour: preset("imagenet-broad", flavour=flavour) for flavour in ("torchvision", "paper")}
BOTH = pytest.mark.parametrize("policy", BROAD.values(), ids=BROAD)


def equal(a: Draws, b: Draws) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Draws))


def many(policy: Policy = POLICY, *, height: int = 375, width: int = 500, n: int = N, **address) -> Draws:
    address = {"seed": 7, "epoch": 3, **address}
    return draw(policy, sample_ids=np.arange(n), sizes=np.tile([height, width], (n, 1)), **address)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Kolmogorov-Smirnov: the gap to U(low, high) exceeds 1.95 / sqrt(n) once in a thousand (fixed seeds: never)."""
    values = np.sort((values.ravel() - low) / (high - low))
    n = len(values)
    assert values[0] >= 0
    assert values[-1] <= 1
    steps = np.arange(n)
    gap = max(np.abs(values - steps / n).max(), np.abs(values - (steps + 1) / n).max())
    assert gap < 1.95 / math.sqrt(n)


def assert_counts(counts: np.ndarray) -> None:
    """Chi-square of equally likely cells, by the normal bound at four standard deviations."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


def assert_share(mask: np.ndarray, probability: float) -> None:
    sigma = math.sqrt(probability * (1 - probability) / mask.size)
    assert abs(mask.mean() - probability) <= 4 * sigma


# --- a draw is a function of its address ---------------------------------------------------------------------------

addresses = st.lists(
    st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60)),
    min_size=1,
    max_size=12,
)


@BOTH
@settings(max_examples=60, deadline=None)
@given(addresses, st.integers(0, 2**64 - 1), st.randoms(use_true_random=False), st.data())
def test_a_draw_does_not_depend_on_its_batch(policy, rows, seed, random, data):
    # Sides from 1 to 60: many of these images are strips, so that flavour paper needs its later attempts.
    ids, epochs, heights, widths = (np.array(column) for column in zip(*rows, strict=True))
    sizes = np.stack([heights, widths], axis=1)
    whole = draw(policy, seed=seed, epoch=epochs, sample_ids=ids, sizes=sizes)
    shuffled = random.sample(range(len(rows)), len(rows))
    cut = data.draw(st.integers(0, len(rows)))
    for part in (shuffled[:cut], shuffled[cut:]):
        alone = draw(policy, seed=seed, epoch=epochs[part], sample_ids=ids[part], sizes=sizes[part])
        assert equal(alone, whole[part])
    single = draw(policy, seed=seed, epoch=int(epochs[0]), sample_ids=ids[:1], sizes=sizes[:1])
    assert equal(single, whole[:1])


@BOTH
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_draw_what_one_process_draws(policy: Policy, ranks: int):
    ids = np.arange(200) * 97
    sizes = np.stack([20 + ids % 13, 20 + ids % 113], axis=1)
    whole = draw(policy, seed=1, epoch=2, sample_ids=ids, sizes=sizes)
    for rank in range(ranks):
        mine = slice(rank, None, ranks)
        assert equal(draw(policy, seed=1, epoch=2, sample_ids=ids[mine], sizes=sizes[mine]), whole[mine])


@BOTH
def test_a_view_does_not_depend_on_how_many_there_are(policy: Policy):
    strips = {"height": 30, "width": 100, "n": 50}
    assert equal(many(policy, views=5, **strips)[:, :2], many(policy, **strips))
    assert equal(many(policy, views=5, **strips)[:, :1], many(policy, views=1, **strips))
    assert equal(many(policy, views=5, **strips)[:, 2:4], many(policy, views=2, first_view=2, **strips))


@pytest.mark.parametrize("other", [{"seed": 8}, {"seed": 7 + 2**32}, {"epoch": 4}])
def test_another_seed_or_epoch_is_another_draw(other: dict):
    assert not np.isin(many(n=500, **other).sigma, many(n=500).sigma).any()


def test_high_and_low_words_of_the_sample_id_both_count():
    ids = np.array([5, 5 + 2**32, -5, 2**63 - 1])
    sigma = draw(POLICY, seed=0, epoch=0, sample_ids=ids, sizes=np.full((4, 2), 9)).sigma
    assert len(np.unique(sigma)) == 8


@BOTH
def test_parameters_views_and_neighbouring_samples_are_independent(policy: Policy):
    d = many(policy, height=400, width=400)
    columns = {f.name: getattr(d, f.name).astype(float) for f in fields(Draws) if f.name != "order"}
    columns |= {"first": d.order[..., 0].astype(float), "last": d.order[..., 3].astype(float)}
    for side, length in (
        ("top", "height"),
        ("left", "width"),
    ):  # a place is independent of the size as a share of its room
        columns[side] = (columns[side] + 0.5) / (401 - columns[length])
    columns["area"], columns["ratio"] = (
        columns["height"] * columns["width"],
        columns.pop("width") / columns.pop("height"),
    )
    table = np.concatenate(
        [np.stack([c[:-1, 0], c[:-1, 1], c[1:, 0]]) for c in columns.values()],
    )  # (parameters * 3, N - 1)
    correlation = np.corrcoef(table)
    names = [(name, who) for name in columns for who in range(3)]
    for i, j in itertools.combinations(range(len(names)), 2):
        # Of one view, first and last of an order exclude each other, and area and ratio must fit the image together.
        related = names[i][1] == names[j][1] and {names[i][0], names[j][0]} in ({"first", "last"}, {"area", "ratio"})
        assert related or abs(correlation[i, j]) < 4.5 / math.sqrt(N), (names[i], names[j])


def test_the_table_of_words_is_frozen():
    # A change of these numbers changes every run that was ever started.
    d = draw(POLICY, seed=2, epoch=1, sample_ids=np.array([123456789012]), sizes=np.array([[375, 500]])).flatten()
    assert [d.top.tolist(), d.left.tolist(), d.height.tolist(), d.width.tolist()] == GOLDEN_BOXES
    assert [d.flip.tolist(), d.jitter.tolist(), d.grayscale.tolist(), d.blur.tolist()] == GOLDEN_FLAGS
    assert d.order.tolist() == GOLDEN_ORDER
    factors = np.stack([d.brightness, d.contrast, d.saturation, d.hue, d.sigma])
    np.testing.assert_allclose(factors, GOLDEN_FACTORS, rtol=1e-6)


GOLDEN_BOXES = [[0, 28], [3, 13], [375, 343], [484, 414]]
GOLDEN_FLAGS = [[True, True], [True, True], [False, False], [True, True]]
GOLDEN_ORDER = [[3, 0, 2, 1], [1, 3, 0, 2]]
GOLDEN_FACTORS = [
    [1.609638698, 0.465121861],
    [0.346416635, 0.537271849],
    [1.309793221, 1.579091967],
    [-0.129893674, -0.050000189],
    [1.876723293, 0.87401341],
]


# sha256 of the arrays below, before there were flavours and solarize.
FIRST_FIELDS = ["top", "left", "height", "width", "flip", "jitter", "brightness", "contrast", "saturation", "hue"]
FIRST_FIELDS += ["order", "grayscale", "blur", "sigma"]
DIGESTS = {
    "imagenet": "88d0dac07e2952baaab9c5fd859a8a144c2a540c97a69918f22d781d5ad62ca0",
    "cifar": "13b6e29b959054d71e876c82b58967c1538852168168166bb348882a4d479bd2",
}


@pytest.mark.parametrize("solarize", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", DIGESTS)
def test_later_parameters_do_not_change_the_first_ones(name: str, solarize: float):
    policy = preset(name).model_copy(update={"solarize_probability": solarize})  # type: ignore[arg-type]
    rows = np.arange(5000)
    sizes = np.stack([1 + rows % 600, 1 + rows * 7 % 500], axis=1)
    d = draw(policy, seed=2**63 + 5, epoch=rows % 7, sample_ids=rows * 2**40 - 3, sizes=sizes)
    digest = hashlib.sha256()
    for field in FIRST_FIELDS:
        array = getattr(d, field)
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    assert digest.hexdigest() == DIGESTS[name]


def block_of(number: int, *, seed: int, epoch: int, sample: int, view: int) -> list[float]:
    counter = np.array([sample & 0xFFFFFFFF, sample >> 32, epoch, view << 16 | number], dtype=np.uint32)
    return uniforms(philox4x32(counter, key_of(seed))).tolist()


@BOTH
def test_solarize_is_the_first_word_of_block_8(policy: Policy):
    ids = np.arange(60) * 2**33 + 1
    d = draw(policy, seed=3, epoch=9, sample_ids=ids, sizes=np.full((60, 2), 32))
    for row, sample in enumerate(ids.tolist()):
        for view in range(2):
            word = block_of(8, seed=3, epoch=9, sample=sample, view=view)[0]
            assert d.solarize[row, view] == (word < 0.2)


def test_the_papers_later_attempts_have_blocks_of_their_own():
    # A strip that an attempt in forty fits, followed word by word.
    height, width = 10, 100
    d = draw(PAPER, seed=3, epoch=9, sample_ids=np.arange(40), sizes=np.tile([height, width], (40, 1)))
    needed = []
    for sample, view in itertools.product(range(40), range(2)):
        blocks = [*range(3, 8), *range(16, 61)]
        words = [w for b in blocks for w in block_of(b, seed=3, epoch=9, sample=sample, view=view)]
        place = block_of(2, seed=3, epoch=9, sample=sample, view=view)
        box, attempt = (0, 0, height, width), 100
        for k in range(100):
            area = (0.08 + 0.92 * words[2 * k]) * height * width
            ratio = 3 / 4 + (4 / 3 - 3 / 4) * words[2 * k + 1]
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                box, attempt = (int(place[2] * (height - h + 1)), int(place[3] * (width - w + 1)), h, w), k
                break
        needed.append(attempt)
        assert tuple(int(x[sample, view]) for x in (d.top, d.left, d.height, d.width)) == box
    assert min(needed) < 10 < max(n for n in needed if n < 100)  # early ones, late ones,
    assert 100 in needed  # and whole images


def test_a_seed_that_does_not_fit_is_an_error_for_users():
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match="seed"):
            many(n=1, seed=seed)


def test_no_samples_give_no_draws():
    assert many(n=0).shape == (0, 2)


# --- the stated distributions --------------------------------------------------------------------------------------


@BOTH
def test_factors_are_uniform_in_their_ranges(policy: Policy):
    d = many(policy)
    for factor in (d.brightness, d.contrast, d.saturation):
        assert_uniform(factor, 0.2, 1.8)
    assert_uniform(d.hue, -0.2, 0.2)
    assert_uniform(d.sigma, 0.1, 2.0)


def test_a_factor_is_never_negative():
    d = many(Policy(brightness=3.0), n=2000)
    assert_uniform(d.brightness, 0.0, 4.0)


@BOTH
def test_switches_have_their_probabilities(policy: Policy):
    d = many(policy)
    assert_share(d.flip, 0.5)
    assert_share(d.jitter, 0.8)
    assert_share(d.grayscale, 0.2)
    assert_share(d.blur, 0.5)
    assert_share(d.solarize, 0.2)
    assert not many(n=100).solarize.any()


def test_probabilities_zero_and_one_are_never_and_always():
    sure = {"jitter_probability": 1, "grayscale_probability": 1, "solarize_probability": 1}
    d = many(Policy(flip_probability=0, blur_probability=0, **sure))
    assert not d.flip.any()
    assert not d.blur.any()
    assert d.jitter.all()
    assert d.grayscale.all()
    assert d.solarize.all()


@BOTH
def test_all_24_orders_are_equally_likely(policy: Policy):
    order = many(policy).order.reshape(-1, 4)
    codes = order @ (64, 16, 4, 1)
    expected = {int(np.dot(p, (64, 16, 4, 1))) for p in itertools.permutations(range(4))}
    found, counts = np.unique(codes, return_counts=True)
    assert set(found.tolist()) == expected
    assert_counts(counts)


def test_crop_area_and_ratio_follow_the_policy_where_every_attempt_fits():
    policy = Policy(crop_scale=(0.1, 0.4), crop_ratio=(0.5, 2.0))
    d = many(policy, height=4000, width=4000)  # large, so that rounding to pixels does not show
    assert_uniform(d.height * d.width / 4000**2, 0.1 - 1e-4, 0.4 + 1e-4)
    assert_uniform(np.log(d.width / d.height), math.log(0.5) - 1e-3, math.log(2) + 1e-3)


def test_the_papers_crop_area_and_ratio_are_uniform_where_every_attempt_fits():
    policy = PAPER.model_copy(update={"crop_scale": (0.1, 0.4), "crop_ratio": (0.5, 2.0)})
    d = many(policy, height=4000, width=4000)
    assert_uniform(d.height * d.width / 4000**2, 0.1 - 1e-4, 0.4 + 1e-4)
    assert_uniform(d.width / d.height, 0.5 - 1e-3, 2 + 2e-3)


@BOTH
def test_crop_places_are_uniform_where_the_crop_has_room(policy: Policy):
    one_size = {"crop_scale": (0.25, 0.25), "crop_ratio": (1.0, 1.0)}
    d = many(policy.model_copy(update=one_size), height=20, width=40)
    assert set(d.height.ravel().tolist()) == set(d.width.ravel().tolist()) == {14}
    assert_counts(np.bincount(d.top.ravel(), minlength=7))
    assert_counts(np.bincount(d.left.ravel(), minlength=27))


def plain_crop(policy: Policy, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """torchvision.transforms.RandomResizedCrop.get_params, or the paper's, without the place."""
    paper = policy.flavour == "paper"
    for _ in range(100 if paper else 10):
        area = height * width * rng.uniform(*policy.crop_scale)
        ratio = rng.uniform(*policy.crop_ratio) if paper else math.exp(rng.uniform(*np.log(policy.crop_ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return h, w
    if paper:
        return height, width
    if width / height < policy.crop_ratio[0]:
        return round(width / policy.crop_ratio[0]), width
    if width / height > policy.crop_ratio[1]:
        return height, round(height * policy.crop_ratio[1])
    return height, width


@BOTH
@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 20), (9, 90)])
def test_crop_sizes_are_distributed_as_the_plain_loops(policy: Policy, height: int, width: int):
    # Two-sample Kolmogorov-Smirnov on the areas and the widths; the strips take the fallback now and then.
    n = 4000
    d = many(policy, n=n, height=height, width=width)
    rng = np.random.default_rng(0)
    twin = np.array([plain_crop(policy, height, width, rng) for _ in range(n)])
    for ours, theirs in ((d.height[:, 0] * d.width[:, 0], twin.prod(axis=1)), (d.width[:, 0], twin[:, 1])):
        grid = np.union1d(ours, theirs)
        gap = np.searchsorted(np.sort(ours), grid, "right") - np.searchsorted(np.sort(theirs), grid, "right")
        assert np.abs(gap).max() / n < 1.95 * math.sqrt(2 / n)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 10, (0, 0, 10, 10)), (100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13)), (1, 1, (0, 0, 1, 1))],
)
def test_without_a_fitting_attempt_the_crop_is_central(height: int, width: int, box: tuple[int, ...]):
    # No crop of three times the area fits, so that every draw falls back.
    policy = Policy.model_construct(**{**POLICY.model_dump(), "crop_scale": (3.0, 3.0)})
    d = many(policy, height=height, width=width, n=3)
    for row in np.stack([d.top, d.left, d.height, d.width], axis=-1).reshape(-1, 4):
        assert tuple(row.tolist()) == box


@pytest.mark.parametrize(("height", "width"), [(10, 10), (3, 100), (100, 3), (1, 1)])
def test_without_a_fitting_attempt_the_papers_crop_is_the_whole_image(height: int, width: int):
    policy = Policy.model_construct(**{**PAPER.model_dump(), "crop_scale": (3.0, 3.0)})
    d = many(policy, height=height, width=width, n=3)
    for row in np.stack([d.top, d.left, d.height, d.width], axis=-1).reshape(-1, 4):
        assert tuple(row.tolist()) == (0, 0, height, width)


@BOTH
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
def test_a_crop_lies_inside_its_image(policy: Policy, height: int, width: int, seed: int):
    d = many(policy, height=height, width=width, n=20, seed=seed)
    assert d.top.min() >= 0
    assert d.left.min() >= 0
    assert min(d.height.min(), d.width.min()) >= 1
    assert (d.top + d.height).max() <= height
    assert (d.left + d.width).max() <= width


def test_flattened_views_of_an_image_stand_side_by_side():
    d = many(n=3)
    flat = d.flatten()
    assert flat.shape == (6,)
    assert flat.order.shape == (6, 4)
    assert flat.sigma.tolist() == [d.sigma[i, v] for i in range(3) for v in range(2)]
    assert len(d) == 3
