"""Models that do not fit segmentation, and one that counts its forwards."""

from __future__ import annotations

import torch
from torch import nn

import dist_train
from dist_train.models.small import small_fcn


@dist_train.register_model("shrinking")
def shrinking(num_classes: int, in_channels: int) -> nn.Module:
    """Returns an image smaller than the mask."""
    return nn.Conv2d(in_channels, num_classes, 3)


class _TwoHeaded(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return (self.net(x), self.net(x)) if self.training else self.net(x)


@dist_train.register_model("two_headed")
def two_headed(num_classes: int, in_channels: int) -> nn.Module:
    """Returns a second tensor in train mode, as networks with auxiliary heads do."""
    return _TwoHeaded(small_fcn(num_classes, in_channels))


class _Counting(nn.Module):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x).mean((2, 3)))


@dist_train.register_model("counting")
def counting(num_classes: int, in_channels: int) -> nn.Module:
    """Counts the forwards in train mode in its BatchNorm."""
    return _Counting(num_classes, in_channels)
