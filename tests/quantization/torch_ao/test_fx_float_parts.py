"""The fx backend leaves operations in floating point whose integer kernels differ from fake quantization."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from dist_train.config.stages import RuleConfig
from dist_train.quantization.layer_sqnr import layer_sqnr
from dist_train.quantization.torch_ao import fx
from dist_train.quantization.torch_ao.integer_model import IntegerModel
from tests.support.one_net_all_backends import backend
from tests.support.tiny_nets import calibrate

LEAST = (
    50.0  # dB: single roundings that fall otherwise in a layer of thousands; integers on a wrong grid give less than 35
)


class _Around(nn.Module):
    """An operation on [B, 16, 8, 8] between convolutions."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.operation = operation
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self.stem(x))).flatten(1)


def squeeze_excitation() -> nn.Module:
    return nn.Sequential(nn.Hardswish(), SqueezeExcitation(16, 8, scale_activation=nn.Hardsigmoid))


def worst(operation: Callable[[Tensor], Tensor], rules: list[RuleConfig] | None = None) -> float:
    """Signal to noise of the worst layer, in dB, after the ranges were learned from what is measured on."""
    torch.manual_seed(0)
    model, images = _Around(operation).eval(), torch.randn(64, 3, 8, 8)
    prepared = calibrate(backend("fx").prepare(model, images[:2], rules or []), images).eval()
    converted = backend("fx").convert(prepared)
    assert isinstance(converted, IntegerModel)
    assert any("quantized" in type(module).__module__ for module in converted.modules()), "the rest is integers"
    return min(layer_sqnr(prepared, converted, images).values())


OPERATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "squeeze_excitation": squeeze_excitation,
    "global_pool": lambda: nn.AdaptiveAvgPool2d(1),
    "pool": lambda: nn.AvgPool2d(2),
    "functional_pool": lambda: lambda x: F.avg_pool2d(x, 3, 1, 1),
    "mean": lambda: lambda x: x.mean((2, 3), keepdim=True),
    "factor": lambda: lambda x: 0.3 * x * torch.mul(x, 2.0),
    "prelu": nn.PReLU,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_int8_computes_what_fake_quantization_simulates(name: str) -> None:
    assert worst(OPERATIONS[name]()) > LEAST


def test_a_module_that_a_rule_skips_computes_in_floating_point() -> None:
    rule = RuleConfig.model_validate({"match": {"type": "Hardswish"}, "skip": True})
    assert worst(squeeze_excitation(), [rule]) > LEAST


@pytest.mark.parametrize(("name", "cure"), [("squeeze_excitation", "_hide"), ("factor", "_keep_factors_in_float")])
def test_torch_ao_left_to_itself_computes_something_else(name: str, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fx, cure, lambda *_: {})
    assert worst(OPERATIONS[name]()) < LEAST


def test_a_mean_over_maps_of_one_pixel_in_channels_last() -> None:
    images = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.ReLU()).to(memory_format=torch.channels_last)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = model, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).mean((2, 3)))

    prepared = calibrate(backend("fx").prepare(Mean().eval(), images), images).eval()
    assert backend("fx").convert(prepared)(images.contiguous(memory_format=torch.channels_last)).shape == (4, 3)
