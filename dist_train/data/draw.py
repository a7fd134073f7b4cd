"""Draws rows by weight, as a function of (weights, key, position): the weighted counterpart of a permutation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dist_train.data.permutation import Int64Array, uniform

Order = Callable[[Int64Array], Int64Array]
"""Maps positions of an epoch (int64, any shape) to rows of the dataset."""
_Float64Array = npt.NDArray[np.float64]
_CHUNK = 1 << 16  # rows whose keys are computed at once, so that they stay in the cache
_LN2 = math.log(2.0)
# log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + s^5 / 5 + ...); |s| <= 0.172 here, so that the next term is below 1e-16.
_SERIES = tuple(1 / power for power in range(19, 0, -2))


class WeightedDraw:
    """Draws rows of a dataset with probabilities proportional to their weights.

    With replacement, each position of an epoch is an independent draw, as of torch's WeightedRandomSampler: the row in
    whose share of the summed weights a hash of (key, position) falls. Any position costs O(log rows), without those
    before it.

    Without replacement, the rows are sorted by -log(u) / weight, with u a hash of (key, row): each next row is drawn
    from those that are left (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", IPL 97, 2006). The
    sort is made once for a key.

    All arithmetic is exactly rounded, so that ranks with other CPUs draw the same rows.

    Args:
        weights: numbers [rows], finite, at least 0, with a sum above 0; a row of weight 0 is never drawn.
        replacement: rows may be drawn several times.
        samples: positions of an epoch; None: as many as there are rows, without replacement as many as have a weight
            above 0.

    Raises:
        ValueError: the weights are not as said, or there are fewer rows to draw than `samples` without replacement.
    """

    def __init__(self, weights: npt.ArrayLike, replacement: bool = True, samples: int | None = None) -> None:
        values = checked_weights(weights)
        available = len(values) if replacement else int(np.count_nonzero(values))
        self.samples = available if samples is None else samples
        if self.samples < 1:
            raise ValueError(f"an epoch draws at least one row, not {self.samples}")
        if not replacement and self.samples > available:
            raise ValueError(
                f"{self.samples} rows cannot be drawn without replacement: {available} have a weight above 0"
            )
        self.rows = len(values)
        self.replacement = replacement
        if replacement:
            self._sums = np.cumsum(values)
            self._last = len(values) - 1 - int((values[::-1] > 0).argmax())
        else:
            self._drawable = np.flatnonzero(values)
            self._weights = values[self._drawable]

    def order(self, key: int) -> Order:
        """Returns the rows that are drawn with a key, by position."""
        if self.replacement:
            return lambda positions: self._at(positions, key)
        order = self._sorted(key)
        return lambda positions: order[positions]

    def _at(self, positions: Int64Array, key: int) -> Int64Array:
        places = uniform(positions, key) * self._sums[-1]
        # The product may round up to the sum itself.
        found = np.minimum(np.searchsorted(self._sums, places, side="right"), self._last)
        return found.astype(np.int64)

    def _sorted(self, key: int) -> Int64Array:
        """Sorts the rows by their exponential keys; sorting rows and keys in one integer is faster than an argsort."""
        count = len(self._drawable)
        low = np.uint64(max(1, (count - 1).bit_length()))
        packed = np.empty(count, np.uint64)
        for start in range(0, count, _CHUNK):
            places = np.arange(start, min(start + _CHUNK, count))
            exponential = _negative_log(uniform(self._drawable[places], key) + 2.0**-54)
            with np.errstate(over="ignore"):
                keys = exponential / self._weights[places]
            # Floats of one sign are ordered as their bits. The row takes the place of the last bits, and decides ties.
            packed[places] = keys.view(np.uint64) >> low << low | places.astype(np.uint64)
        if self.samples < count:
            packed = np.partition(packed, self.samples - 1)[: self.samples]
        packed.sort()
        place = packed & np.uint64((1 << int(low)) - 1)
        return self._drawable[place.astype(np.int64)]


def checked_weights(weights: npt.ArrayLike) -> _Float64Array:
    """Returns the weights as float64 [rows].

    Raises:
        ValueError: they are not numbers [rows], finite and at least 0, with a finite sum above 0; names the first that
            is not.
    """
    values = np.asarray(weights)
    if values.dtype.kind not in "biuf" or values.ndim != 1 or not len(values):
        raise ValueError(f"weights must be numbers [rows], one a row, not {values.dtype} {list(values.shape)}")
    values = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        total, least = float(values.sum()), float(values.min())
    if 0 < total < math.inf and least >= 0:
        return values
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        more = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
        raise ValueError(f"the weight of row {wrong[0]} is {values[wrong[0]]:g}, not a finite number >= 0{more}")
    raise ValueError(f"the sum of the weights is {total:g}, not a finite number above 0")


def _negative_log(values: _Float64Array) -> _Float64Array:
    """Returns -log(values), values in (0, 1], to about 1e-15.

    It adds, multiplies and divides only, which gives the same bits on all CPUs; numpy's log differs in the last bit.
    """
    mantissa, exponent = np.frexp(values)
    small = mantissa < math.sqrt(0.5)
    mantissa = np.where(small, 2 * mantissa, mantissa)
    exponent = exponent - small
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    series = np.full_like(s, _SERIES[0])
    for factor in _SERIES[1:]:
        series = series * square + factor
    return -(exponent * _LN2 + 2 * s * series)
