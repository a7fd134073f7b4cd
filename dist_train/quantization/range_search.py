"""Search for ranges that clip rare, large activations, from histograms over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.quantization.ranges import Ranges

BINS = 2048
"""Bins of each activation's histogram, as in torch.ao's HistogramObserver."""
_AT_ONCE = 2**22  # values counted at once: their bin numbers take twice the memory of the values
_SHRINKS = torch.linspace(1, 0.05, 96).tolist()  # factors tried for an end; too few bins lie within a smaller range


class Histograms:
    """Histogram of each activation, in `BINS` equal bins between the ends of its range.

    The ends must be equal on all ranks, as after a MAX over the first pass. One int64 tensor is summed over the ranks:
    counts are exact in any order.

    Attributes:
        counts: int64 [len(ranges), BINS].
    """

    def __init__(self, ranges: Ranges) -> None:
        """ranges: known for every module; the whole range of its values."""
        self._ranges = ranges
        self.low, self.high = ranges.bounds()
        self.counts = torch.zeros(len(ranges), BINS, dtype=torch.int64, device=self.low.device)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the inputs of every forward inside the block, also of a module that is called at several places."""
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
                # With a range of zero width all values go into the first bin: 0 / 0 is NaN.
                places = ((part.float() - low) / width).nan_to_num(0.0).clamp(0, BINS - 1).long()
                self.counts[row] += torch.bincount(places, minlength=BINS)

        return count

    def edges(self) -> Tensor:
        """Returns the ends of the bins, float32 [len(ranges), BINS + 1]."""
        steps = torch.linspace(0, 1, BINS + 1, device=self.low.device)
        return torch.lerp(self.low[:, None], self.high[:, None], steps)


def percentile_ranges(histograms: Histograms, percentile: float) -> tuple[Tensor, Tensor]:
    """Returns ranges below which at most 100 - `percentile` percent of the values lie, and above which as many.

    The precision is a bin's width. Where most values are one value, as after a ReLU, that end stays unchanged.

    Returns:
        The low and the high ends, float32 [len(ranges)] each.
    """
    counts, edges = histograms.counts, histograms.edges()
    spared = (counts.sum(1, keepdim=True) * ((100 - percentile) / 100) + 1e-6).floor()  # 100 - 99.99 is not quite 0.01
    # Number of whole bins at an end whose values may be clipped.
    below = (counts.cumsum(1) <= spared).sum(1, keepdim=True).clamp(max=BINS - 1)
    above = (counts.flip(1).cumsum(1) <= spared).sum(1, keepdim=True).clamp(max=BINS - 1)
    return edges.gather(1, below).squeeze(1), edges.gather(1, BINS - above).squeeze(1)


def least_error_ranges(histograms: Histograms, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Returns ranges with the least mean squared error of quantization, for clipping and rounding together.

    Both ends move towards 0 together over a grid, then each in turn while the other stays, twice (coordinate descent).
    The criterion is from Choukroun et al. 2019, arXiv:1902.06822, section 4. Values count as the middle of their bin.

    Returns:
        The low and the high ends, float32 [len(ranges)] each.
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
        best = torch.stack(errors).argmin(0)  # the first of equal errors, which clips least
        found = torch.stack(candidates)[best, :, rows].T
    return found[0], found[1]
