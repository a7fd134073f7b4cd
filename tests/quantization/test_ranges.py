"""Ranges: what steps saw, merged and folded in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dist_train.errors import QuantizationError
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.ranges import Ranges

INF = float("inf")


class Two(nn.Sequential):
    """A chain of two fake-quantize modules."""

    def __init__(self) -> None:
        super().__init__(ActivationFakeQuantize(), ActivationFakeQuantize())

    def __getitem__(self, index: int) -> ActivationFakeQuantize:  # type: ignore[override]
        module = super().__getitem__(index)
        assert isinstance(module, ActivationFakeQuantize)
        return module


def two() -> tuple[Two, Ranges]:
    model = Two()
    return model, Ranges(model)


def test_observed_is_the_negated_lows_and_then_the_highs() -> None:
    model, ranges = two()
    model[0](torch.tensor([-1.0, 3.0]))
    assert ranges.observed().tolist() == [1.0, -INF, 3.0, -INF]
    assert ranges.observed().dtype == torch.float32


def test_a_range_lags_one_step() -> None:
    model, ranges = two()
    x = torch.tensor([-10.0, 10.0])
    model(x / 10)
    ranges.update(ranges.observed(), 0.5)
    assert torch.allclose(model[0](x), x / 10, atol=0.01), "quantized with the range of the step before"
    ranges.update(ranges.observed(), 0.5)
    assert model[0].high.item() == pytest.approx(5.5)


def test_the_first_range_is_taken_whole_and_later_ones_move_by_the_average() -> None:
    model, ranges = two()
    ranges.update(torch.tensor([1.0, -INF, 3.0, -INF]), 0.25)
    assert (model[0].low.item(), model[0].high.item()) == (-1.0, 3.0)
    assert ranges.unknown() == ["1"]
    ranges.update(torch.tensor([2.0, 4.0, 7.0, 8.0]), 0.25)
    assert (model[0].low.item(), model[0].high.item()) == (-1.25, 4.0)
    assert (model[1].low.item(), model[1].high.item()) == (-4.0, 8.0)
    assert ranges.unknown() == []


def test_the_min_max_observer_only_widens_a_range() -> None:
    model = Two()
    ranges = Ranges(model, "min_max")
    for merged in ([1.0, -INF, 3.0, -INF], [2.0, 4.0, 1.0, 8.0], [0.5, 1.0, 2.0, 9.0]):
        ranges.update(torch.tensor(merged), 0.25)
    assert [end.tolist() for end in ranges.bounds()] == [[-2.0, -4.0], [3.0, 9.0]]


def test_an_assigned_range_is_taken_as_it_is() -> None:
    model, ranges = two()
    ranges.assign(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 5.0]))
    assert ranges.unknown() == []
    assert model[1].scale.item() == pytest.approx(5 / 255)


def test_micro_batches_and_shared_modules_merge_by_minimum_and_maximum() -> None:
    model, ranges = two()
    for batch in (torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 5.0]), torch.tensor([-3.0, 1.0])):
        model[0](batch)
    assert ranges.observed().tolist() == [3.0, -INF, 5.0, -INF]


def test_a_step_starts_afresh_after_update_and_after_drop() -> None:
    model, ranges = two()
    for forget in (lambda: ranges.update(ranges.observed(), 0.1), ranges.drop):
        model(torch.tensor([-100.0, 100.0]))
        forget()
        assert ranges.observed().tolist() == [-INF] * 4


def test_a_filler_rank_that_drops_does_not_enter_the_maximum() -> None:
    merged: list[Tensor] = []
    for values, filler in (([-1.0, 2.0], False), ([-50.0, 50.0], True)):
        model, ranges = two()
        model(torch.tensor(values))
        if filler:
            ranges.drop()
        merged.append(ranges.observed())
    assert torch.maximum(*merged).tolist() == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_what_is_not_finite_leaves_a_range_alone(bad: float) -> None:
    model, ranges = two()
    ranges.update(torch.tensor([1.0, 1.0, 3.0, 3.0]), 1.0)
    before = ranges.digest()
    model[0](torch.tensor([0.0, bad]))
    ranges.update(ranges.observed(), 0.5)
    assert ranges.digest() == before


def test_frozen_ranges_stay_whatever_comes() -> None:
    model, ranges = two()
    ranges.update(torch.tensor([1.0, 1.0, 3.0, 3.0]), 1.0)
    ranges.freeze()
    before = ranges.digest()
    model(torch.tensor([-100.0, 100.0]))
    ranges.update(ranges.observed(), 0.5)
    assert ranges.digest() == before


def test_digest_tells_the_last_bit_of_a_range() -> None:
    model, ranges = two()
    ranges.update(torch.tensor([1.0, 1.0, 3.0, 3.0]), 1.0)
    other = copy.deepcopy(model)
    assert Ranges(other).digest() == ranges.digest()
    other[1].high.copy_(torch.nextafter(other[1].high, torch.tensor(INF)))
    assert Ranges(other).digest() != ranges.digest()


def test_scale_and_zero_point_follow_the_affine_formula() -> None:
    model, ranges = two()
    ranges.update(torch.tensor([1.0, -1.0, 3.0, 2.0]), 1.0)
    assert (model[0].scale.item(), model[0].zero_point.item()) == (pytest.approx(4 / 255), 64.0)
    assert (model[1].scale.item(), model[1].zero_point.item()) == (pytest.approx(2 / 255), 0.0), "widened to contain 0"


def test_unknown_ranges_are_named() -> None:
    _, ranges = two()
    with pytest.raises(QuantizationError, match="2 of 2 activations have no range: 0, 1"):
        ranges.require_known()
