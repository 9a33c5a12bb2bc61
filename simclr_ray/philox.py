"""Philox4x32-10: random numbers that are a function of an address.

A counter-based generator (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", the Random123
library) has no state: the same (counter, key) gives the same four words on any machine, in any order, alone or
in a batch. That is what makes a view independent of world size, rank and retries.

NumPy's own `numpy.random.Philox` is the 4x64 variant and makes one stream per object; here a million addresses
are one vectorised call.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]

ROUNDS = 10
# Multipliers and Weyl increments of the paper (table 2; Random123's philox.h).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

_WORD = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter: UInt32Array, key: UInt32Array) -> UInt32Array:
    """Four random words for each counter.

    Args:
        counter: (..., 4) uint32.
        key: (..., 2) uint32; broadcasts against the counters.

    Returns:
        (..., 4) uint32, the known answers of Random123's `philox4x32` with 10 rounds.
    """
    assert counter.shape[-1:] == (4,), counter.shape
    assert key.shape[-1:] == (2,), key.shape
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    m0, m1 = (np.uint64(m) for m in MULTIPLIERS)
    for _ in range(ROUNDS):
        p0, p1 = c0 * m0, c2 * m1  # 32 x 32 bits: exact in 64
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1 & _LOW, (p0 >> _WORD) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(WEYL[0])) & _LOW, (k1 + np.uint64(WEYL[1])) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def key_of(seed: int) -> UInt32Array:
    """The (2,) key of a 64-bit seed, low word first."""
    assert 0 <= seed < 1 << 64, seed
    return np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)


def uniforms(words: UInt32Array) -> npt.NDArray[np.float64]:
    """Map words to [0, 1), exactly `word / 2**32`: every value is a multiple of 2**-32, and 1 never occurs."""
    return np.multiply(words, 2.0**-32, dtype=np.float64)
