"""Registers networks that are difficult to quantize, and any network with the statistics of a trained one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import dist_train
from dist_train.config.data import ModelConfig
from dist_train.models.build import build_model


class _Reused(nn.Module):
    """Calls one convolution, one batch norm and one activation twice."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for _ in range(2):
            x = x + self.relu(self.bn(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class _Branching(nn.Module):
    """Takes one of two branches, depending on the values in the batch."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_channels, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.mean() > 0:
            x = F.relu(x)
        return self.fc(x.mean((2, 3)))


@dist_train.register_model("reused_module")
def reused_module(num_classes: int, in_channels: int) -> nn.Module:
    return _Reused(num_classes, in_channels)


@dist_train.register_model("branch_on_data")
def branch_on_data(num_classes: int, in_channels: int) -> nn.Module:
    return _Branching(num_classes, in_channels)


@dist_train.register_model("same_padding")
def same_padding(num_classes: int, in_channels: int) -> nn.Module:
    """Convolutions with "same" padding: odd, even and dilated kernels, and one with uneven padding."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding="same", bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, (2, 4), padding="same"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="valid"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def _images(rows: int, channels: int, size: int, seed: int) -> dist_train.ImageArrays:
    """Two alternating patterns with noise: uint8 [rows, channels, size, size]."""
    patterns = F.interpolate(torch.rand(2, channels, 4, 4, generator=torch.Generator().manual_seed(0)), size)
    noise = torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(rows) % 2
    return dist_train.ImageArrays(((patterns[labels] * 0.9 + noise * 0.1) * 255).to(torch.uint8), labels)


@dist_train.register_dataset("two_patterns")
def two_patterns(data: dist_train.DataConfig) -> dist_train.Splits:
    """args: channels, size."""
    train, test = (_images(rows, seed=rows, **data.args) for rows in (16, 32))
    channels = data.args["channels"]
    return dist_train.Splits(train, test, 2, ("a", "b"), mean=(0.5,) * channels, std=(0.25,) * channels)


@dist_train.register_model("settled")
@torch.no_grad()
def settled(num_classes: int, in_channels: int, kind: str, size: int, args: dict[str, Any]) -> nn.Module:
    """The model `kind` with batch norms fitted to `two_patterns` and a last layer that separates the patterns.

    A fresh deep network's outputs are nearly equal for all images, so rounding would decide its int8 predictions.
    """
    model = build_model(ModelConfig(name=kind, args=args), num_classes, in_channels).eval()
    rows = _images(16, in_channels, size, seed=1)
    images = (rows.images / 255 - 0.5) / 0.25
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: _settle(module, inputs[0]))
        for module in model.modules()
        if isinstance(module, _BatchNorm)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    _tell_apart(model, images, rows.targets)
    return model


def _settle(batch_norm: nn.Module, inputs: Tensor) -> None:
    """Sets the statistics of `inputs`, with one variance for all channels: a tiny one would amplify noise."""
    batch_norm.get_buffer("running_mean").copy_(inputs.transpose(0, 1).flatten(1).mean(1))
    batch_norm.get_buffer("running_var").fill_(inputs.transpose(0, 1).flatten(1).var(1).mean())


def _tell_apart(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Sets the last layer so that the mean of each class is 3 logits off the middle."""
    head = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    features = seen[0].flatten(2).mean(2) if seen[0].dim() == 4 else seen[0]
    means = [features[labels == label].mean(0) for label in (0, 1)]
    towards = (means[1] - means[0]) * 6 / (means[1] - means[0]).square().sum()
    middle = towards @ (means[0] + means[1]) / 2
    assert head.bias is not None
    head.weight.copy_(torch.stack([-towards, towards]).view_as(head.weight))
    head.bias.copy_(torch.stack([middle, -middle]))
