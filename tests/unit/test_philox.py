from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_ray.philox import key_of, philox4x32, uniforms

WORD = st.integers(0, 2**32 - 1)
ADDRESS = st.tuples(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """The definition (Salmon et al. 2011, section 3.3), one word at a time."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right % 2**32, (left >> 32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


# Random123, tests/kat_vectors, "philox4x32 10"
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter: str, key: str, answer: str):
    assert philox4x32(words(counter), words(key)).tolist() == words(answer).tolist()


@given(st.lists(ADDRESS, min_size=1, max_size=5))
def test_the_vectorised_generator_is_the_plain_one(addresses):
    counters = np.array([counter for counter, _ in addresses], dtype=np.uint32)
    keys = np.array([key for _, key in addresses], dtype=np.uint32)
    assert philox4x32(counters, keys).tolist() == [plain_philox(*address) for address in addresses]


def test_a_key_broadcasts_over_counters():
    counters = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    together = philox4x32(counters, key_of(2**64 - 5))
    assert together.shape == (2, 3, 4)
    assert together[1, 2].tolist() == philox4x32(counters[1, 2], key_of(2**64 - 5)).tolist()


def test_the_key_holds_the_whole_seed():
    assert key_of(0x0123456789ABCDEF).tolist() == [0x89ABCDEF, 0x01234567]


def test_uniforms_are_exact_and_never_one():
    u = uniforms(np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32))
    assert u.dtype == np.float64
    assert u.tolist() == [0.0, 2.0**-32, 0.5, 1 - 2.0**-32]
