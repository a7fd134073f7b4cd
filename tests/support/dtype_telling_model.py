"""A model that writes the dtype of its activations to a file: --import tests.support.dtype_telling_model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

import dist_train


class _Telling(nn.Module):
    """Writes the mode and dtype of each input as a line of the file that TELL names, one file per rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "TELL" in os.environ and not torch.compiler.is_compiling():
            with (Path(os.environ["TELL"]) / os.environ.get("RANK", "0")).open("a") as file:
                file.write(f"{'train' if self.training else 'eval'} {x.dtype}\n")
        return x


@dist_train.register_model("telling")
def telling(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), _Telling(), nn.ReLU(), nn.Linear(16, num_classes))
