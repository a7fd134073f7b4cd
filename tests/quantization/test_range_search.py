"""Clipped ranges: what the counts of an activation's values say about where to cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.range_search import BINS, Histograms, least_error_ranges, percentile_ranges
from dist_train.quantization.ranges import Ranges


def counted(*batches: Tensor, quant_max: int = 255, symmetric: bool = False) -> tuple[Histograms, Ranges]:
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    model = nn.Sequential(ActivationFakeQuantize(quant_max=quant_max, qscheme=scheme))
    ranges = Ranges(model)
    for batch in batches:
        model(batch)
    ranges.update(ranges.observed(), 1.0)
    histograms = Histograms(ranges)
    with histograms.counting():
        for batch in batches:
            model(batch)
    model(batches[0])
    return histograms, ranges


def normal(size: int = 20000) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def error(values: Tensor, ranges: Ranges, low: Tensor, high: Tensor) -> float:
    return float((ranges.simulate(values[None], low, high) - values).square().mean())


def test_every_value_is_counted_once_and_only_within_the_block() -> None:
    values = torch.linspace(-1, 3, 4 * BINS)
    histograms, _ = counted(values, values.flip(0))
    assert int(histograms.counts.sum()) == 2 * len(values)
    assert histograms.counts[0, 0] > 0 and histograms.counts[0, -1] > 0
    assert int(histograms.counts.max() - histograms.counts.min()) <= 4, "they lie evenly"


def test_a_percentile_cuts_no_more_than_its_share_at_either_end() -> None:
    values = normal()
    histograms, _ = counted(values)
    low, high = percentile_ranges(histograms, 99)
    bin_width = float(histograms.high - histograms.low) / BINS
    assert float(low) == pytest.approx(float(values.quantile(0.01)), abs=1.5 * bin_width)
    assert float(high) == pytest.approx(float(values.quantile(0.99)), abs=1.5 * bin_width)
    assert (values < low).sum() <= 200 and (values > high).sum() <= 200
    whole = percentile_ranges(histograms, 100)
    assert (float(whole[0]), float(whole[1])) == (float(values.min()), float(values.max()))


def test_a_percentile_leaves_the_end_where_most_values_are() -> None:
    low, high = percentile_ranges(counted(normal().relu())[0], 99.9)
    assert float(low) == 0
    assert 2.5 < float(high) < 3.6


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_least_error_leaves_an_outlier_out_and_beats_the_whole_range(symmetric: bool) -> None:
    values = torch.cat([normal(), torch.tensor([60.0])])
    histograms, ranges = counted(values, quant_max=15, symmetric=symmetric)
    low, high = least_error_ranges(histograms, ranges)
    assert float(high) < 20
    assert error(values, ranges, low, high) < 0.5 * error(values, ranges, histograms.low, histograms.high)


def test_the_least_error_is_nearly_that_of_a_search_over_all_ranges() -> None:
    values = normal()
    histograms, ranges = counted(values, quant_max=15)
    found = error(values, ranges, *least_error_ranges(histograms, ranges))
    grid = torch.linspace(0.3, 1, 15)
    best = min(error(values, ranges, histograms.low * left, histograms.high * right) for left in grid for right in grid)
    assert found <= 1.02 * best


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_an_activation_of_one_value_keeps_its_range(value: float) -> None:
    histograms, ranges = counted(torch.full((10,), value))
    assert int(histograms.counts[0, 0]) == 10
    assert [float(end) for end in percentile_ranges(histograms, 99)] == [value, value]
    low, high = least_error_ranges(histograms, ranges)
    assert error(torch.full((10,), value), ranges, low, high) == pytest.approx(0, abs=1e-9)
