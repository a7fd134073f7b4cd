"""Fake-quantize modules by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dist_train.errors import QuantizationError
from dist_train.quantization.fake_quantize import (
    ActivationFakeQuantize,
    WeightFakeQuantize,
)
from dist_train.quantization.ranges import Ranges

qd = torch.ops.quantized_decomposed


def with_range(low: float, high: float) -> ActivationFakeQuantize:
    module = ActivationFakeQuantize()
    Ranges(nn.Sequential(module)).update(torch.tensor([-low, high], dtype=torch.float32), 1.0)
    return module


def test_before_a_range_is_known_the_input_passes_unchanged_and_is_observed() -> None:
    module, x = ActivationFakeQuantize(), torch.tensor([-1.0, 0.3, 2.0])
    assert module(x) is x
    assert (module.step_low.item(), module.step_high.item()) == (-1.0, 2.0)


def test_disabled_is_the_identity() -> None:
    module, x = with_range(-1, 2), torch.randn(100)
    module.enabled = False
    assert module(x) is x


def test_activations_equal_the_operators_that_convert_writes() -> None:
    module, x = with_range(-1.1, 2.3), torch.randn(10000)
    scale, zero_point = module.calculate_qparams()
    arguments = (float(scale), int(zero_point), 0, 255, torch.uint8)
    assert torch.equal(module(x), qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *arguments), *arguments))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "scheme", ["per_channel_symmetric", "per_channel_affine", "per_tensor_symmetric", "per_tensor_affine"]
)
def test_weights_equal_the_operators_that_convert_writes(scheme: str, bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    module = WeightFakeQuantize(quant_min=low, quant_max=high, qscheme=getattr(torch, scheme))
    weight = (torch.randn(8, 4, 3, 3) + 0.5) * torch.logspace(-6, 2, 8).view(-1, 1, 1, 1)
    module.settle(weight)
    scale, zero_point = module.calculate_qparams()
    if module.per_tensor:
        arguments = (float(scale), int(zero_point), low, high, torch.int8)
        expected = qd.dequantize_per_tensor(qd.quantize_per_tensor(weight, *arguments), *arguments)
    else:
        each = (scale, zero_point, 0, low, high, torch.int8)
        expected = qd.dequantize_per_channel(qd.quantize_per_channel(weight, *each), *each)
    assert torch.equal(module(weight), expected)
    step = scale.max() if module.per_tensor else scale.view(-1, 1, 1, 1)
    assert ((module(weight) - weight).abs() <= 1.001 * step).all(), "nothing is clipped by more than a step"


def test_affine_weights_spend_no_integers_on_values_that_do_not_occur() -> None:
    weight = torch.rand(4, 9)
    errors = [
        (WeightFakeQuantize(qscheme=scheme)(weight) - weight).square().mean()
        for scheme in (torch.per_channel_affine, torch.per_channel_symmetric)
    ]
    assert errors[0] < 0.4 * errors[1]


def test_a_symmetric_activation_has_zero_in_the_middle_and_the_same_grid_on_both_sides() -> None:
    module = ActivationFakeQuantize(qscheme=torch.per_tensor_symmetric, quant_max=15)
    Ranges(nn.Sequential(module)).update(torch.tensor([3.5, 1.0]), 1.0)
    assert (module.scale.item(), module.zero_point.item()) == (0.5, 8)
    assert module(torch.tensor([-9.0, -3.5, 0.0, 3.5, 9.0])).tolist() == [-4.0, -3.5, 0.0, 3.5, 3.5]


def test_zero_is_exactly_representable_even_for_a_range_without_it() -> None:
    for low, high in ((0.5, 2.0), (-2.0, -0.5), (-0.37, 1.9), (0.0, 0.0)):
        assert with_range(low, high)(torch.zeros(1)).item() == 0.0


def test_gradient_passes_inside_the_range_and_stops_outside() -> None:
    x = torch.tensor([-5.0, -0.5, 0.5, 5.0], requires_grad=True)
    with_range(-1, 1)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_weights_pass_the_whole_gradient_and_keep_their_largest_value() -> None:
    weight = torch.randn(4, 9, requires_grad=True)
    out = WeightFakeQuantize()(weight)
    out.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.allclose(out.abs().amax(1), weight.abs().amax(1), rtol=1e-6)


def test_the_scale_follows_the_weight() -> None:
    module, weight = WeightFakeQuantize(), torch.randn(4, 9)
    assert torch.allclose(module(weight * 100), module(weight) * 100, rtol=1e-5)


def test_bfloat16_is_quantized_in_float32() -> None:
    module, x = with_range(-1, 1), torch.linspace(-1, 1, 1000).bfloat16()
    out = module(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, module(x.float()).bfloat16())


def test_a_channel_of_zeros_stays_zero() -> None:
    assert torch.equal(WeightFakeQuantize()(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_loading_state_makes_the_range_known() -> None:
    source, target, x = with_range(-1, 2), ActivationFakeQuantize(), torch.randn(100)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x)) and not torch.equal(target(x), x)


def test_the_step_is_not_in_the_state() -> None:
    assert set(ActivationFakeQuantize().state_dict()) == {"low", "high", "scale", "zero_point", "initialized"}


def test_a_copy_keeps_flags_and_range() -> None:
    source, x = with_range(-1, 2), torch.randn(100)
    source.observing = False
    copied = copy.deepcopy(source)
    assert not copied.observing and torch.equal(copied(x), source(x))


def test_convert_without_a_range_says_what_to_do() -> None:
    with pytest.raises(QuantizationError, match="ptq before convert"):
        ActivationFakeQuantize().calculate_qparams()
