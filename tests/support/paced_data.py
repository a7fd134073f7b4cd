"""A dataset whose rows take their time until a file `fast` is made, and wait while a file `hold` is there.

A process that waits makes a file `held-PID`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

import dist_train

SECONDS = 0.03  # so that a run of 600 steps lasts longer than what a test does to it


class Paced(Dataset[tuple[torch.Tensor, int]]):
    input_shape = (1, 8, 8)

    def __init__(self, length: int, seconds: float = 0.0) -> None:
        self._length, self._seconds = length, seconds

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        while self._seconds and os.path.exists("hold"):
            Path(f"held-{os.getpid()}").touch()
            time.sleep(0.05)
        if not os.path.exists("fast"):
            time.sleep(self._seconds)
        return torch.full((1, 8, 8), index / self._length), index % 2


@dist_train.register_dataset("paced")
def paced(data: dist_train.DataConfig) -> dist_train.Splits:
    return dist_train.Splits(Paced(48, SECONDS), Paced(8), 2, ("a", "b"))
