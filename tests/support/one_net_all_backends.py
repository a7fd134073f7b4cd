"""A network for every quantization backend, and functions that tests call in other processes and on ranks.

--import tests.support.one_net_all_backends registers it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules_qat

import dist_train
from dist_train.config.stages import QATConfig
from dist_train.distributed.world import World
from dist_train.quantization.backend import QuantizationBackend, build_backend
from dist_train.quantization.ranges import Ranges


class StubNet(nn.Module):
    """Two convolutions (one with a bias), different batch norms, a residual sum, dropout, a head, an unused part."""

    def __init__(self, num_classes: int = 5, in_channels: int = 3, momentum: float = 0.01) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3, momentum=momentum)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-2, momentum=0.3)
        self.add, self.unused = FloatFunctional(), FloatFunctional()
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = self.add.add_relu(x, self.bn2(self.conv2(x)))
        return self.dequant(self.fc(self.dropout(x.mean((2, 3)))))

    def fuse_model(self, is_qat: bool) -> None:
        assert is_qat
        fuse_modules_qat(self, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]], inplace=True)


@dist_train.register_model("stub_net")
def stub_net(num_classes: int, in_channels: int) -> nn.Module:
    return StubNet(num_classes, in_channels, momentum=0.2)  # so that few steps give usable statistics


def backend(name: str, engine: str = "auto") -> QuantizationBackend:
    return build_backend(QATConfig.model_validate({"backend": name, "engine": engine}))


def digests(name: str) -> list[str]:
    """SHA-256 of a converted StubNet's program and of its state_dict."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model, x = StubNet().eval(), torch.rand(8, 3, 16, 16)
    prepared = backend(name).prepare(model, x)
    with torch.no_grad():
        prepared(x)
    ranges = Ranges(prepared)
    ranges.update(ranges.observed(), 1.0)
    program = backend(name).serialize(backend(name).convert(prepared), x)
    return [hashlib.sha256(data).hexdigest() for data in (program.data, program.extra["state_dict.pt"])]


def ranges_of_rank(world: World, names: list[str]) -> list[dict[str, Any]]:
    """Ranges per backend after a step, merged over the ranks; this rank sees inputs up to rank + 1."""
    found = []
    for name in names:
        torch.manual_seed(3)
        prepared = backend(name).prepare(StubNet().eval(), torch.zeros(2, 3, 16, 16))
        x = torch.linspace(0, world.rank + 1, 8 * 3 * 16 * 16).view(8, 3, 16, 16)
        with torch.no_grad():
            prepared(x)
        ranges = Ranges(prepared)
        ranges.update(world.all_reduce(ranges.observed(), "max"), 1.0)
        high = float(ranges.modules[0].high)
        found.append({"digest": ranges.digest(), "unknown": ranges.unknown(), "first": high})
    return found
