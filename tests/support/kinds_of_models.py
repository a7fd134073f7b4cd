"""A tiny model and dataset of each kind: tables, sensors, several inputs, frozen and tied parts, own backwards.

--import tests.support.kinds_of_models registers what a run needs; the U-Net and its images with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import dist_train
from tests.support import signal_nets

assert signal_nets  # its import registers the U-Net and the noisy images

CATEGORIES, NUMBERS, CLASSES = (5, 7), 6, 3


class Rows(Dataset[Any]):
    """Items made once by a function of a generator."""

    def __init__(self, size: int, seed: int, item: Callable[[torch.Generator], Any]) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._items = [item(generator) for _ in range(size)]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def splits(item: Callable[[torch.Generator], Any], outputs: int) -> dist_train.Splits:
    return dist_train.Splits(Rows(72, 0, item), Rows(29, 1, item), outputs)


@dist_train.register_dataset("kinds_table")
def table(data: dist_train.DataConfig) -> dist_train.Splits:
    """Items ({"categories": int64 [2], "numbers": float32 [6]}, number)."""

    def item(generator: torch.Generator) -> Any:
        categories = torch.stack([torch.randint(0, most, (), generator=generator) for most in CATEGORIES])
        numbers = torch.randn(NUMBERS, generator=generator)
        return {"categories": categories, "numbers": numbers}, float(numbers.sum() + categories[0] - categories[1])

    return splits(item, 1)


class Table(nn.Module):
    """An embedding of each category beside the numbers, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(most, 4) for most in CATEGORIES)
        self.hidden = nn.Sequential(nn.Linear(8 + NUMBERS, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 1)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        embedded = [each(categories[:, place]) for place, each in enumerate(self.embed)]
        out: Tensor = self.head(torch.relu(self.hidden(torch.cat([*embedded, numbers], 1))))
        return out


@dist_train.register_model("kinds_table")
def table_net() -> nn.Module:
    return Table()


@dist_train.register_dataset("kinds_sensor")
def sensor(data: dist_train.DataConfig) -> dist_train.Splits:
    """Items (waves of three channels [3, 32] of a class's frequency, class)."""

    def item(generator: torch.Generator) -> Any:
        label = int(torch.randint(0, CLASSES, (), generator=generator))
        phases = 6.28 * torch.rand(3, 1, generator=generator)
        times = torch.arange(32) / 32 * 6.28 * (2 + 3 * label)
        return torch.sin(times + phases) + 0.1 * torch.randn(3, 32, generator=generator), label

    return splits(item, CLASSES)


@dist_train.register_model("kinds_sensor")
def sensor_net(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 16, 5, padding=2, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


@dist_train.register_dataset("kinds_pair")
def pair(data: dist_train.DataConfig) -> dist_train.Splits:
    """Items ((image float32 [1, 8, 8], vector float32 [4]), class)."""

    def item(generator: torch.Generator) -> Any:
        image, vector = torch.randn(1, 8, 8, generator=generator), torch.randn(4, generator=generator)
        return (image, vector), int(image.mean() * 4 + vector.sum() > 0)

    return splits(item, 2)


class ImageAndVector(nn.Module):
    """A branch for an image and one for a vector, joined before the head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()
        )
        self.vector = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.head = nn.Linear(48, classes)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.image(image), self.vector(vector)], 1))
        return out


@dist_train.register_model("kinds_pair")
def pair_net(num_classes: int) -> nn.Module:
    return ImageAndVector(num_classes)


@dist_train.register_model("kinds_backbone")
def backbone_and_head(num_classes: int) -> nn.Module:
    """A backbone with a BatchNorm, to be frozen, and a head; for sensors."""
    net = nn.Sequential()
    net.add_module("backbone", nn.Sequential(nn.Conv1d(3, 16, 5, padding=2, bias=False), nn.BatchNorm1d(16), nn.ReLU()))
    net.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Flatten()))
    net.add_module("head", nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_classes)))
    return net


@dist_train.register_dataset("kinds_vectors")
def vectors(data: dist_train.DataConfig) -> dist_train.Splits:
    """Items (vector float32 [16] of rank 4, the same): what an autoencoder is for."""
    basis = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))

    def item(generator: torch.Generator) -> Any:
        vector = torch.randn(4, generator=generator) @ basis
        return vector, vector

    return splits(item, 16)


class Tied(nn.Module):
    """An autoencoder of vectors [B, 16] whose encoder and decoder are two Linears with one weight, [16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 16), nn.Linear(16, 16)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(torch.relu(self.encoder(x)))
        return out


@dist_train.register_model("kinds_tied")
def tied() -> nn.Module:
    return Tied()


class SignSTE(torch.autograd.Function):
    """The sign, whose backward lets gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def sign_of_torch(x: Tensor) -> Tensor:
    """Computes as SignSTE does, forward and backward, by what torch differentiates."""
    return x + (torch.where(x >= 0, 1.0, -1.0) - x).detach()


class Signs(nn.Module):
    """A sensor's net with the signs of a layer's outputs in the middle."""

    def __init__(self, classes: int, own: bool) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv1d(3, 16, 5, padding=2, bias=False), nn.BatchNorm1d(16))
        self.after = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.head = nn.Linear(16, classes)
        self._sign: Callable[[Tensor], Tensor] = SignSTE.apply if own else sign_of_torch

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.after(self._sign(self.before(x))))
        return out


@dist_train.register_model("kinds_signs")
def signs(num_classes: int, own: bool) -> nn.Module:
    return Signs(num_classes, own)
