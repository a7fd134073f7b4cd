"""Tests each quantization backend on a tiny model: prepares, runs, converts, and compares the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dist_train.doctor.base import Line, Subject, bad, good
from dist_train.errors import DistTrainError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dist_train.quantization.backend import QuantizationBackend

SHAPE = (3, 8, 8)
_BOUND = 0.1  # of the largest output; rounding to 8 bits makes about 0.01 of a net this small


def check_pt2e(subject: Subject) -> Iterator[Line]:
    def build() -> QuantizationBackend:
        from dist_train.quantization.pt2e.backend import PT2EBackend

        return PT2EBackend()

    yield _tried(subject, "pt2e", build)


def check_fx(subject: Subject) -> Iterator[Line]:
    def build() -> QuantizationBackend:
        from dist_train.quantization.torch_ao.fx import FXBackend

        return FXBackend()

    yield _tried(subject, "fx", build)


def check_eager(subject: Subject) -> Iterator[Line]:
    def build() -> QuantizationBackend:
        from dist_train.quantization.torch_ao.eager import EagerBackend

        return EagerBackend()

    yield _tried(subject, "eager", build)


def _tried(subject: Subject, name: str, build: Callable[[], QuantizationBackend]) -> Line:
    try:
        backend = build()
    except DistTrainError as error:  # this torch or torchao does not have it
        return subject.lacking(name, f"{name}: {error.message}", error.hint)
    try:
        model = _with_stubs() if name == "eager" else tiny_net()
        converted, expected = quantize(backend, model)
    except DistTrainError as error:
        return bad(f"{name}: {error.message}", error.hint)
    outputs = converted(images())
    difference = float((outputs - expected).abs().max() / expected.abs().max())
    said = f"{name}: a tiny net was prepared and converted; int8 differs from fake quantization by {difference:.1%}"
    engine = getattr(backend, "engine", None)
    said += f" (kernels: {engine})" if engine else ""
    hint = "report this with the line on the CPU; meanwhile --qat.backend with another of pt2e, fx, eager"
    return good(said) if difference < _BOUND else bad(said, hint)


def quantize(backend: QuantizationBackend, model: nn.Module) -> tuple[nn.Module, Tensor]:
    """Returns the converted model, and the prepared one's outputs for `images()`."""
    import torch

    from dist_train.quantization.ranges import Ranges

    prepared = backend.prepare(model, images()).eval()
    with torch.no_grad():
        prepared(images())
        ranges = Ranges(prepared)
        ranges.update(ranges.observed(), 1.0)
        ranges.freeze()
        return backend.convert(prepared), prepared(images())


def tiny_net() -> nn.Module:
    """Returns a convolution with BatchNorm and ReLU, and a linear layer of 4 outputs; seeded, in eval mode."""
    import torch
    from torch import nn

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).eval()


def images() -> Tensor:
    """Returns float32 [16, *SHAPE] in [0, 1), the same at each call."""
    import torch

    return torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1))


def _with_stubs() -> nn.Module:
    """Returns the same net with the stubs that the eager backend needs."""
    from torch import nn
    from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules, fuse_modules_qat

    class Stubbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.net, self.dequant = QuantStub(), tiny_net(), DeQuantStub()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.dequant(self.net(self.quant(x)))
            return outputs

        def fuse_model(self, is_qat: bool | None = None) -> None:
            (fuse_modules_qat if is_qat else fuse_modules)(self.net, ["0", "1", "2"], inplace=True)

    return Stubbed().eval()
