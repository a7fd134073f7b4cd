"""A keyed pseudo-random permutation of range(size), evaluated where asked: shuffling without a list of all indices."""

import hashlib
import math

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
_UInt64Array = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
# Up to this size the permutation is a table, sorted by hashes: bounded work, and as uniform as the hash.
# Feistel networks over a few elements have too few round functions to reach every permutation evenly (over powers of
# two they are all even), and here cycle walking would cost most.
_TABLE_SIZE = 1024
# Luby and Rackoff need 4 rounds against few queries, but an epoch queries the whole domain; FF1 (NIST SP 800-38G) takes
# 10.
_ROUNDS = 10
_SHIFTS = tuple(np.array([30, 27, 31], np.uint64))
_FACTORS = tuple(np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64))
_HALF = np.uint64(32)
_TO_53_BITS = np.uint64(11)


def derive_key(*parts: int | str) -> int:
    """Derives a 64-bit key from integers and strings: BLAKE2b of their repr, equal on every platform and Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def uniform(counters: npt.ArrayLike, key: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) as a hash of (counter, key): multiples of 2**-53, the same on every platform.

    A counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

    Args:
        counters: int64, any shape, each at least 0.
        key: any integer; taken modulo 2**64.
    """
    first, second = (np.uint64(derive_key("uniform numbers", key & _MASK, half)) for half in (0, 1))
    # A second key in the middle: with the first alone, all keys would give shifted copies of one sequence.
    hashed = _mixed(_mixed(np.asarray(counters, dtype=np.int64).astype(np.uint64) + first) ^ second)
    return (hashed >> _TO_53_BITS) * 2.0**-53


def _mixed(values: _UInt64Array) -> _UInt64Array:
    """SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014); multiplication wraps modulo 2**64."""
    values = (values ^ (values >> _SHIFTS[0])) * _FACTORS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _FACTORS[1]
    return values ^ (values >> _SHIFTS[2])


class Permutation:
    """Pseudo-random permutation of range(size), a function of (size, key) alone.

    A generalised Feistel network with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA
    2002, sections 4 and 5. An element is written x = left * b + right, with left < a, right < b, a * b >= size; each
    round adds a hash of one half to the other, modulo a or b. A result outside range(size) goes through the network
    again. As a = ceil(sqrt(size)) and b = ceil(size / a), at most about one in sqrt(size) elements walks.

    A call costs O(len(positions)) at any size. It shuffles data and is no encryption.

    Args:
        size: number of elements, 1 <= size <= 2**62.
        key: any integer; taken modulo 2**64.

    Raises:
        ValueError: size out of range.
    """

    def __init__(self, size: int, key: int) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation has between 1 and 2**62 elements, not {size}")
        self.size = size
        round_keys = np.array(
            [derive_key("permutation", size, key & _MASK, index) for index in range(_ROUNDS)], np.uint64
        )
        if size <= _TABLE_SIZE:
            hashes = _mixed(np.arange(size, dtype=np.uint64) + round_keys[0])
            self._table = np.argsort(_mixed(hashes ^ round_keys[1]), kind="stable").astype(np.int64)
            return
        root = math.isqrt(size - 1) + 1
        self._left, self._right = np.uint64(root), np.uint64(-(-size // root))
        self._round_keys = round_keys

    def __call__(self, positions: npt.ArrayLike) -> Int64Array:
        """Elements at `positions` (int64, any shape, each in range(size)); raises IndexError for a position outside."""
        values = np.asarray(positions, dtype=np.int64)
        if values.size and (values.min() < 0 or values.max() >= self.size):
            raise IndexError(f"positions must lie in range({self.size}), got {values.min()}..{values.max()}")
        return self._table[values] if self.size <= _TABLE_SIZE else self._walk(values)

    def _walk(self, values: Int64Array) -> Int64Array:
        """Applies the network to all values, then again to the results outside range(size), until none is left."""
        size = np.uint64(self.size)
        result = self._network(values.astype(np.uint64))
        outside = result >= size
        while outside.any():
            result[outside] = self._network(result[outside])
            outside = result >= size
        return result.astype(np.int64)

    def _network(self, values: _UInt64Array) -> _UInt64Array:
        a, b = self._left, self._right
        left = values // b
        right = values - left * b
        for index in range(0, _ROUNDS, 2):
            left = left + self._below(right, index, a)
            left -= a * (left >= a)
            right = right + self._below(left, index + 1, b)
            right -= b * (right >= b)
        return left * b + right

    def _below(self, half: _UInt64Array, index: int, bound: np.uint64) -> _UInt64Array:
        """Round function: a hash of `half`, scaled into range(bound); bound < 2**32, so nothing overflows."""
        hashed = _mixed(half + self._round_keys[index])
        return ((hashed >> _HALF) * bound) >> _HALF
