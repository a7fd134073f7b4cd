"""Backends, a model and datasets with planted faults: --import tests.support.faulty_parts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import dist_train
from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.backend import PT2EBackend


class _ConvertsInItsStage(PT2EBackend):
    """Fails in the stage, not in the trial conversion at set-up."""

    def check(self, model: nn.Module, rules: Sequence[RuleConfig] = (), example: torch.Tensor | None = None) -> None:
        super().check(model, rules)


@dist_train.register_quantization_backend("refusing")
class Refusing(_ConvertsInItsStage):
    def convert(self, prepared: PreparedModel) -> GraphModule:
        raise QuantizationError("layer conv7 cannot be converted", "skip it by a rule")


@dist_train.register_quantization_backend("endless")
class Endless(_ConvertsInItsStage):
    def convert(self, prepared: PreparedModel) -> GraphModule:
        threading.Event().wait()
        raise AssertionError("unreachable")


@dist_train.register_quantization_backend("drifting")
class Drifting(PT2EBackend):
    """Converts with scales that are far too small, so that all values are clipped."""

    def convert(self, prepared: PreparedModel) -> GraphModule:
        for quantizer in prepared.fake_quantizers:
            quantizer.scale.div_(64)
        converted = super().convert(prepared)
        for quantizer in prepared.fake_quantizers:
            quantizer.scale.mul_(64)
        return converted


class Centre(nn.Module):
    """Subtracts a mean that is learned from the batches of its own rank."""

    centre: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.centre.lerp_(x.detach().mean().view(1), 0.1)
        return x - self.centre


@dist_train.register_model("centred")
def centred(num_classes: int) -> nn.Module:
    return nn.Sequential(Centre(), nn.Flatten(), nn.Linear(64, num_classes))


def _images(rows: int) -> dist_train.ImageArrays:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return dist_train.ImageArrays(images, torch.arange(rows) % 6)


@dist_train.register_dataset("growing")
def growing(data: dist_train.DataConfig) -> dist_train.Splits:
    """A dataset with GROWING_ROWS rows."""
    names = tuple("abcdef")
    return dist_train.Splits(_images(int(os.environ["GROWING_ROWS"])), _images(30), 6, names, (0.5,), (0.3,))


class _Undecodable(torch.utils.data.Dataset[Any]):
    """Images of which rank 0 cannot read number 7."""

    def __init__(self, rows: int, planted: str) -> None:
        self._rows, self._planted = rows, planted

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7 and os.environ["RANK"] == "0" and self._rows == 120:
            if self._planted == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("cannot decode image 7")
        return torch.full((1, 8, 8), index / self._rows), index % 6


@dist_train.register_dataset("undecodable")
def undecodable(data: dist_train.DataConfig) -> dist_train.Splits:
    train, evaluation = _Undecodable(120, data.args["planted"]), _Undecodable(30, "")
    return dist_train.Splits(train, evaluation, 6, tuple("abcdef"), (), ())
