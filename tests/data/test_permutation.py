"""The keyed permutation: each element once, everywhere alike, and no more work than asked for."""

import numpy as np
import pytest
from scipy import stats

from dist_train.data import permutation
from dist_train.data.permutation import Permutation, derive_key

SIZES = [
    *range(1, 66),
    255,
    256,
    257,
    1000,
    1023,
    1024,
    1025,
    1026,
    1089,
    1090,
    4095,
    4096,
    4097,
    9973,
    65536,
    99_999,
    100_000,
]


@pytest.mark.parametrize("key", [0, 1, -1, 2**63, 12345678901234567890123])
def test_each_element_has_one_position_at_every_size(key: int) -> None:
    for size in SIZES:
        everything = np.arange(size)
        elements = Permutation(size, key)(everything)
        assert elements.dtype == np.int64
        assert np.array_equal(np.sort(elements), everything), size


def inverse(shuffle: Permutation, elements: np.ndarray) -> np.ndarray:
    """Positions of elements, by the network's rounds in reverse order."""

    def backward(values: np.ndarray) -> np.ndarray:
        a, b = shuffle._left, shuffle._right
        left, right = values // b, values % b
        for index in range(permutation._ROUNDS - 2, -1, -2):
            right = (right + (b - shuffle._below(left, index + 1, b))) % b
            left = (left + (a - shuffle._below(right, index, a))) % a
        return left * b + right

    result = backward(elements.astype(np.uint64))
    while (outside := result >= np.uint64(shuffle.size)).any():
        result[outside] = backward(result[outside])
    return result.astype(np.int64)


@pytest.mark.parametrize("size", [10**9, 10**12, 10**12 + 39, 2**62])
def test_a_huge_size_is_inverted_at_sampled_positions(size: int) -> None:
    positions = np.concatenate(
        [np.arange(500), size - 1 - np.arange(500), np.random.default_rng(0).integers(size, size=5000)]
    )
    shuffle = Permutation(size, key=7)
    elements = shuffle(positions)
    assert elements.min() >= 0 and elements.max() < size
    assert np.array_equal(inverse(shuffle, elements), positions)
    assert np.array_equal(shuffle(inverse(shuffle, positions)), positions)
    assert len(np.unique(elements)) == len(np.unique(positions))


def _p_value(counts: np.ndarray, expected: np.ndarray, freedom: int, correction: float = 1.0) -> float:
    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum() * correction, freedom))


def _cells(permuted: list[np.ndarray], bins: int) -> float:
    """Chi-square p-value of (position, element) pairs, each axis cut into `bins`, under uniform permutations."""
    size = len(permuted[0])
    cut = np.arange(size) * bins // size
    counts = np.zeros((bins, bins))
    for elements in permuted:
        counts += np.bincount(cut * bins + cut[elements], minlength=bins**2).reshape(bins, bins)
    rows = np.bincount(cut, minlength=bins)
    # Each row and column adds up exactly; the variance of a cell is that much larger than a multinomial one's.
    expected = np.outer(rows, rows) / size * len(permuted)
    return _p_value(counts, expected, (bins - 1) ** 2, correction=(size - 1) / size)


@pytest.mark.parametrize(
    ("size", "bins", "keys"),
    [(2, 2, 3000), (3, 3, 3000), (5, 5, 3000), (7, 7, 3000), (1024, 32, 200), (1025, 32, 200), (10007, 32, 100)],
)
def test_every_element_is_equally_likely_at_every_position(size: int, bins: int, keys: int) -> None:
    permuted = [Permutation(size, derive_key("test", key))(np.arange(size)) for key in range(keys)]
    assert 1e-3 < _cells(permuted, bins) < 1 - 1e-3


@pytest.mark.parametrize("size", [5, 1025])
def test_the_test_of_uniformity_notices_identities_and_rotations(size: int) -> None:
    generator = np.random.default_rng(0)
    bins = min(size, 32)
    identities = [np.arange(size)] * 200
    near = [np.roll(np.arange(size), generator.integers(-size // 4, size // 4 + 1)) for _ in range(200)]
    assert _cells(identities, bins) < 1e-3
    assert _cells(near, bins) < 1e-3


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_order_of_a_few_elements_is_equally_likely(size: int) -> None:
    orders, counts = np.unique(
        [Permutation(size, key)(np.arange(size)) for key in range(6000)], axis=0, return_counts=True
    )
    assert len(orders) == np.prod(np.arange(1, size + 1))
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [1025, 4097, 10007])
def test_neighbours_do_not_stay_neighbours(size: int) -> None:
    def p_value(permuted: list[np.ndarray]) -> float:
        bins = np.arange(1, size) * 64 // size
        distance = np.concatenate([np.diff(elements) % size for elements in permuted])
        counts = np.bincount(distance * 64 // size, minlength=64)
        return _p_value(counts, np.bincount(bins, minlength=64) / (size - 1) * len(distance), 63)

    assert p_value([Permutation(size, key)(np.arange(size)) for key in range(100)]) > 1e-3
    rotations = [np.roll(np.arange(size), shift) for shift in range(100)]
    assert p_value(rotations) < 1e-3, "rotations are uniform cell by cell, and must fail here"


def test_keys_and_sizes_give_unrelated_orders() -> None:
    size = 5000
    orders = [Permutation(size, key)(np.arange(size)) for key in (0, 1, 2, 1 << 40)]
    orders.append(Permutation(size + 1, 0)(np.arange(size)))
    for index, order in enumerate(orders):
        for other in orders[:index]:
            assert (order == other).mean() < 0.005


def test_a_slice_costs_as_many_evaluations_as_it_has_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = 0
    mixed = permutation._mixed

    def counting(values: np.ndarray) -> np.ndarray:
        nonlocal evaluated
        evaluated += values.size
        return mixed(values)

    monkeypatch.setattr(permutation, "_mixed", counting)
    for size in (10**5, 10**12):
        evaluated = 0
        Permutation(size, 3)(np.arange(size - 1000, size))
        assert 1000 * permutation._ROUNDS <= evaluated <= 1010 * permutation._ROUNDS


def test_a_position_outside_is_refused() -> None:
    for size in (10, 10_000):
        for position in (-1, size):
            with pytest.raises(IndexError, match=f"range\\({size}\\)"):
                Permutation(size, 0)([position])
    for size in (0, -3, 2**62 + 1):
        with pytest.raises(ValueError, match="between 1 and"):
            Permutation(size, 0)


def test_the_order_is_the_same_in_every_version() -> None:
    """A change of these numbers makes runs irreproducible and resumed ones wrong."""
    assert Permutation(10, 1)(np.arange(10)).tolist() == [5, 3, 9, 7, 4, 0, 2, 8, 1, 6]
    assert Permutation(10**12, 1)(np.arange(4)).tolist() == [875974543692, 268240128908, 582074311226, 286952860211]
    assert derive_key("order", 0, 1) == 10928468831615549421
