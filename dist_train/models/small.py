"""Small networks for small images, trained on CPUs by the shipped configs and the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Block(nn.Module):
    """Two 3x3 convolutions with an identity or 1x1 shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class _SmallResNet(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages = []
        channels = width
        for index in range(blocks):
            stages.append(_Block(channels, width * 2**index, stride=1 if index == 0 else 2))
            channels = width * 2**index
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


def small_resnet(num_classes: int, in_channels: int, width: int = 16, blocks: int = 3) -> nn.Module:
    """A residual network for images of 8 to 64 pixels: inputs float [B, in_channels, H, W], outputs [B, num_classes].

    Args:
        width: channels of the first block; each further block halves the image and doubles them.
        blocks: residual blocks.
    """
    return _SmallResNet(num_classes, in_channels, width, blocks)


def mlp(num_classes: int, in_channels: int, size: int = 28, hidden: int = 64) -> nn.Module:
    """A perceptron without BatchNorm: inputs float [B, in_channels, size, size], outputs [B, num_classes]."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * size * size, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )


class _SmallFCN(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.down = nn.Sequential(_Block(width, 2 * width, stride=2), _Block(2 * width, 4 * width, stride=2))
        self.skip = nn.Conv2d(width, width, 1)
        self.up = nn.Conv2d(4 * width, width, 1)
        self.head = nn.Conv2d(width, num_classes, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.stem(x)
        coarse = F.interpolate(self.up(self.down(fine)), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(F.relu(coarse + self.skip(fine)))


def small_fcn(num_classes: int, in_channels: int, width: int = 16) -> nn.Module:
    """A fully convolutional network for small images.

    Inputs are float [B, in_channels, H, W], outputs [B, num_classes, H, W]. Features at a quarter of the size are
    upsampled and added to fine ones (Long et al. 2015, arXiv:1411.4038).

    Args:
        width: channels at full size; four times as many at a quarter of it.
    """
    return _SmallFCN(num_classes, in_channels, width)
