"""Batch norms with a forward of their own, as model zoos have them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation behind it, in the shape of timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.2)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean = self.running_mean if not self.training or self.track_running_stats else None
        variance = self.running_var if not self.training or self.track_running_stats else None
        x = F.batch_norm(input, mean, variance, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)
        found: Tensor = self.act(self.drop(x))
        return found


class SuperNorm(nn.BatchNorm2d):
    """A batch norm that calls torch's forward, and does something behind it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardswish(super().forward(input))


class PlainNorm(nn.BatchNorm2d):
    """A batch norm of another name."""


class FixedNorm(nn.BatchNorm2d):
    """A batch norm that normalizes by its running statistics in training, too."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class WrittenOutNorm(nn.BatchNorm2d):
    """A batch norm by additions and products."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return super().forward(input)
        assert self.running_var is not None and self.running_mean is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return input * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]
