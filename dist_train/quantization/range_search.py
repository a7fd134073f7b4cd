"""Ranges that leave rare, large activations out: chosen from counts of all ranks' values, so that the world size does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.quantization.ranges import Ranges

BINS = 2048
"""Bins of each activation's histogram, as many as torch.ao's HistogramObserver has."""
_AT_ONCE = 2**22  # values that are counted at once: their places take twice the memory of the values
_SHRINKS = torch.linspace(1, 0.05, 96).tolist()  # tried for an end; of what lies within less, too few bins tell


class Histograms:
    """How often each activation took each value, in `BINS` equal bins between the ends of its range.

    The ends must be the same on all ranks, which a MAX over the first pass makes them. What is sent is one int64 tensor:
    counts are exact in any order.

    Attributes:
        counts: int64 [len(ranges), BINS].
    """

    def __init__(self, ranges: Ranges) -> None:
        """ranges: with the whole range of every module."""
        self._ranges = ranges
        self.low, self.high = ranges.bounds()
        self.counts = torch.zeros(len(ranges), BINS, dtype=torch.int64, device=self.low.device)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """In this block every forward is counted, also that of a module which is called at several places."""
        hooks = [
            module.register_forward_pre_hook(self._counter(row)) for row, module in enumerate(self._ranges.modules)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _counter(self, row: int) -> Any:
        low, width = self.low[row], (self.high[row] - self.low[row]) / BINS

        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for part in inputs[0].detach().flatten().split(_AT_ONCE):
                # A range without width puts everything into the first bin: 0 / 0 is NaN.
                places = ((part.float() - low) / width).nan_to_num(0.0).clamp(0, BINS - 1).long()
                self.counts[row] += torch.bincount(places, minlength=BINS)

        return count

    def edges(self) -> Tensor:
        """float32 [len(ranges), BINS + 1]."""
        steps = torch.linspace(0, 1, BINS + 1, device=self.low.device)
        return torch.lerp(self.low[:, None], self.high[:, None], steps)


def percentile_ranges(histograms: Histograms, percentile: float) -> tuple[Tensor, Tensor]:
    """Ranges of which at most 100 - `percentile` percent of the values lie below, and as many above; float32 [len(ranges)] each.

    To the width of a bin. Where most values are one value, as after a ReLU, that end stays where it is.
    """
    counts, edges = histograms.counts, histograms.edges()
    spared = (counts.sum(1, keepdim=True) * ((100 - percentile) / 100) + 1e-6).floor()  # 100 - 99.99 is not quite 0.01
    # The number of whole bins at an end that hold no more values than may be clipped.
    below = (counts.cumsum(1) <= spared).sum(1, keepdim=True).clamp(max=BINS - 1)
    above = (counts.flip(1).cumsum(1) <= spared).sum(1, keepdim=True).clamp(max=BINS - 1)
    return edges.gather(1, below).squeeze(1), edges.gather(1, BINS - above).squeeze(1)


def least_error_ranges(histograms: Histograms, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Ranges with the least mean squared error of quantization, clipping and rounding together; float32 [len(ranges)] each.

    Both ends are moved towards 0 together over a grid, then each in turn while the other stays, twice (a coordinate descent).
    The criterion is that of Choukroun et al. 2019, arXiv:1902.06822, section 4. Values count as the middle of their bin.
    """
    counts, edges = histograms.counts.double(), histograms.edges()
    middles = (edges[:, 1:] + edges[:, :-1]) / 2
    whole = torch.stack([histograms.low, histograms.high])
    found, rows = whole, torch.arange(len(ranges), device=counts.device)
    for moved in ([0, 1], [1], [0], [1], [0]):
        candidates, errors = [], []
        for shrink in _SHRINKS:
            candidate = found.clone()
            candidate[moved] = whole[moved] * shrink
            difference = ranges.simulate(middles, candidate[0], candidate[1]) - middles
            candidates.append(candidate)
            errors.append((difference.double().square() * counts).sum(1))
        best = torch.stack(errors).argmin(0)  # the first of equal ones, which clips least
        found = torch.stack(candidates)[best, :, rows].T
    return found[0], found[1]
