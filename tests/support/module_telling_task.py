"""A task that writes the modules of its process to files: --import tests.support.module_telling_task."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

import torch

import dist_train
from dist_train.tasks import Classification


def _write(name: str) -> None:
    (Path(os.environ["TELL"]) / name).write_text("\n".join(sorted(sys.modules)))


@dist_train.register_task("module_telling")
class ModuleTelling(Classification):
    """Writes the files `step` at the second training step, and `end` when the process exits."""

    _steps = 0

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self._steps += outputs.requires_grad
        if self._steps == 2 and outputs.requires_grad:  # the optimizer, too, has run
            _write("step")
        return super().loss(outputs, targets)


if "TELL" in os.environ:
    atexit.register(_write, "end")
