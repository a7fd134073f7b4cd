"""A dataset sorted by class that records which samples were read: --import tests.support.sorted_dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

import dist_train

CLASSES, SIZE = 5, 500
LEVELS = torch.arange(SIZE) * CLASSES // SIZE * 50 + 25
"""Brightness of each image, up to 5 more: of the classes in turn, the darkest first."""


class Read(Dataset[Any]):
    """Writes the index of each item that is read to this rank's file."""

    def __init__(self, root: Path) -> None:
        self._file = ids_file(root, int(os.environ.get("RANK", "0")))

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with self._file.open("a") as file:
            file.write(f"{index}\n")
        return _image(index), int(LEVELS[index]) // 50


def ids_file(root: Path, rank: int) -> Path:
    return root / f"ids-{rank}.txt"


def _image(index: int) -> torch.Tensor:
    noise = torch.randint(0, 6, (1, 8, 8), generator=torch.Generator().manual_seed(index))
    return (LEVELS[index] + noise).to(torch.uint8)


@dist_train.register_dataset("sorted")
def sorted_levels(data: dist_train.DataConfig) -> dist_train.Splits:
    assert data.root is not None
    held_out = range(0, SIZE, 10)
    images, targets = torch.stack([_image(index) for index in held_out]), LEVELS[::10] // 50
    evaluation = dist_train.ImageArrays(images, targets)
    names = tuple(f"level {number}" for number in range(CLASSES))
    return dist_train.Splits(Read(Path(data.root)), evaluation, CLASSES, names, mean=(0.0,), std=(1.0,))
