"""The eager backend averages in floating point: its integer kernels round on a coarser grid than fake quantization."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules_qat

from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.torch_ao import eager
from tests.support.one_net_all_backends import backend
from tests.support.tiny_nets import calibrate

LEAST = 40.0  # dB of the answers; integers on the grid of what was averaged gave less than 35
POOLS: dict[str, Callable[[], nn.Module]] = {
    "global": lambda: nn.AdaptiveAvgPool2d(1),
    "local": lambda: nn.AvgPool2d(2),
}


class Pooled(nn.Module):
    """One pool where the converted model has integers, another of the same kind where it has floats."""

    def __init__(self, pool: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.pool, self.head, self.last = pool(), nn.Conv2d(16, 5, 1), pool()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dequant(self.head(self.pool(self.stem(self.quant(x)))))
        return self.last(torch.nn.functional.interpolate(x, scale_factor=2.0)).flatten(1)

    def fuse_model(self, is_qat: bool) -> None:
        fuse_modules_qat(self, [["stem.0", "stem.1"]], inplace=True)


def fidelity(pool: Callable[[], nn.Module]) -> float:
    """Signal to noise of int8's answers against the fake-quantized model's, in dB."""
    torch.manual_seed(0)
    model, images = Pooled(pool).train(), torch.randn(64, 3, 8, 8)
    prepared = calibrate(backend("eager").prepare(model, images[:2]), images).eval()
    prepared.observe(False)
    with torch.no_grad():
        right, int8 = prepared(images), backend("eager").convert(prepared)(images)
    return float(10 * torch.log10(right.square().sum() / (right - int8).square().sum()))


@pytest.mark.parametrize("name", POOLS)
def test_int8_averages_as_fake_quantization_simulates(name: str) -> None:
    assert fidelity(POOLS[name]) > LEAST


@pytest.mark.parametrize("name", POOLS)
def test_pools_on_integers_compute_something_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_average_in_float", lambda *_: None)
    assert fidelity(POOLS[name]) < LEAST


def test_only_a_pool_between_stubs_gets_a_range_and_the_mode_is_kept() -> None:
    prepared = backend("eager").prepare(Pooled(POOLS["global"]).train(), torch.randn(2, 3, 8, 8))
    found = {name for name, module in prepared.named_modules() if isinstance(module, ActivationFakeQuantize)}
    assert {name.split(".")[1] for name in found} == {"quant", "stem", "pool", "head"}
    assert prepared.training
