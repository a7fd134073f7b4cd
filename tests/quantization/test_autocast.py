"""A model's own torch.autocast: refused by name where it computes otherwise, and no hindrance where it is disabled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_train.config.stages import QATConfig
from dist_train.errors import QuantizationError
from dist_train.quantization.backend import build_backend

pytestmark = pytest.mark.heavy
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def __init__(self, enabled: bool | None) -> None:
        super().__init__()
        self.conv, self.enabled = nn.Conv2d(4, 4, 3, padding=1), enabled

    def forward(self, x: Tensor) -> Tensor:
        if self.enabled is None:
            return self.conv(x).float()
        with torch.autocast(x.device.type if isinstance(x, Tensor) else "cpu", torch.bfloat16, self.enabled):
            x = self.conv(x)
        return x.float()


class Net(nn.Module):
    def __init__(self, enabled: bool | None) -> None:
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 4, 3), Inner(enabled), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.inner(self.stem(x)).mean((2, 3)))
        return y


@pytest.mark.parametrize("backend", ["pt2e", "fx"])
def test_an_enabled_one_is_refused_at_set_up(backend: str) -> None:
    with pytest.raises(QuantizationError, match=r"inner\.conv: .*autocast in forward cannot be quantized") as error:
        build_backend(QATConfig(backend=backend)).check(Net(True).eval(), (), IMAGES)
    assert "`precision`" in error.value.hint


@pytest.mark.parametrize("backend", ["pt2e", "fx"])
def test_layers_under_a_disabled_one_are_quantized(backend: str) -> None:
    made = build_backend(QATConfig(backend=backend))
    made.check(Net(False).eval(), (), IMAGES)
    disabled, without = (len(made.prepare(Net(each).eval(), IMAGES).fake_quantizers) for each in (False, None))
    assert disabled == without >= 3
