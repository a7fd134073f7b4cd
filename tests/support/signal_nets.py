"""Small networks beyond classifying images: signals, recurrences, and an image for an image.

--import tests.support.signal_nets registers what a run needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import dist_train
from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.splits import Splits


class SignalNet(nn.Module):
    """1-d convolutions over a signal [B, 3, L]: with a BatchNorm, with a ReLU, strided, grouped; a head of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 16, 5, padding=2, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.rectified = nn.Sequential(nn.Conv1d(16, 16, 3, padding="same"), nn.ReLU())
        self.down = nn.Conv1d(16, 16, 3, stride=2, groups=4)
        self.up = nn.Sequential(nn.ConvTranspose1d(16, 8, 4, stride=2, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.up(self.down(self.rectified(self.stem(x)))).mean(-1)))


class UNet(nn.Module):
    """Two levels: convolutions, a transposed convolution with a BatchNorm and one without, joined skips, a 1x1 head.

    Images [B, C, H, W] of even sides that are divisible by 4; outputs [B, K, H, W].
    """

    def __init__(self, outputs: int, channels: int, width: int = 8) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())

        self.first, self.second = block(channels, width), block(width, 2 * width)
        self.bottom, self.pool = block(2 * width, 4 * width), nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = block(4 * width, 2 * width)
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.join1, self.head = block(2 * width, width), nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(self.pool(first))
        x = self.up2(self.bottom(self.pool(second)))
        x = self.up1(self.join2(torch.cat([x, second], 1)))
        return self.head(self.join1(torch.cat([x, first], 1)))


class Recurrent(nn.Module):
    """A recurrent layer over [B, L, 3], and two Linears."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.recurrent, self.hidden, self.head = layer(3, 16, batch_first=True), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.recurrent(x)[0].mean(1))))


@dist_train.register_model("unet")
def unet(num_classes: int, in_channels: int, width: int = 8) -> nn.Module:
    return UNet(num_classes, in_channels, width)


@dist_train.register_dataset("noisy_images")
def noisy_images(data: DataConfig) -> Splits:
    """Images of rectangles with noise, and as targets the same in 0..1 without it, float32 [N, 1, 16, 16]."""
    generator = torch.Generator().manual_seed(0)

    def split(size: int) -> ImageArrays:
        clean = torch.zeros(size, 1, 16, 16)
        for image, (left, top, wide, high) in zip(
            clean, torch.randint(2, 8, (size, 4), generator=generator).tolist(), strict=True
        ):
            image[:, top : top + high, left : left + wide] = 1
        noisy = 0.7 * clean + 0.3 * torch.rand(clean.shape, generator=generator)
        return ImageArrays((noisy * 255).to(torch.uint8), clean)

    return Splits(split(data.args.get("num_train", 240)), split(41), mean=(0.3,), std=(0.3,), num_outputs=1)
