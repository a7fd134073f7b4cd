"""Whole runs of a few seconds in this process, for tests of a run's output and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import dist_train
from dist_train.cli import main
from dist_train.errors import EXIT_INTERRUPTED
from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from dist_train.tasks import Classification
from tests.support.torch_settings import own_torch_settings

STEPS = 11
"""Optimizer steps of an epoch."""

CONFIG = """\
run: {name: small, threads_per_rank: 1, device: cpu}
data:
  name: fake
  args: {num_train: 203, num_eval: 61, num_classes: 6, channels: 1, height: 8, width: 8}
  global_batch_size: 20
model: {name: mlp, args: {size: 8, hidden: 16}}
stages: [train]
train: {epochs: 3, optim: {lr: 0.02}}
qat: {epochs: 2}
log: {every_steps: 1}
"""


class Interrupted(KeyboardInterrupt):
    """Ends a run, which keeps its checkpoints."""


@dist_train.register_task("interruptible")
class Interruptible(Classification):
    """Raises Interrupted at step `at`, counted over the losses with gradients since the run began; None: never."""

    at: int | None = None
    seen = 0

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if outputs.requires_grad:
            Interruptible.seen += 1
            if Interruptible.at == Interruptible.seen - 1:
                raise Interrupted
        return super().loss(outputs, targets)


def run_here(*arguments: str) -> int:
    """Runs `dist-train` in this process and returns its exit code."""
    with own_torch_settings():
        return main(list(arguments))


class Runs:
    """Makes runs in a folder; `folder / name` is the run directory of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "small.yaml"
        self.config.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {folder / 'cache'}\n"))

    def __call__(self, name: str, *options: str, interrupt_at: int | None = None) -> int:
        """Runs `dist-train run` and returns its exit code, or -1 if it was interrupted at the given step."""
        Interruptible.at, Interruptible.seen = interrupt_at, 0
        given = [] if interrupt_at is None and "--task.name" not in options else ["--task.name", "interruptible"]
        try:
            code = run_here("run", str(self.config), "--run.dir", str(self.folder / name), *given, *options)
            return -1 if interrupt_at is not None and code == EXIT_INTERRUPTED else code
        finally:
            Interruptible.at = None

    def results(self, name: str) -> Any:
        return read_json(RunDir(self.folder / name).results)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in RunDir(self.folder / name).metrics.read_text().splitlines()]

    def checkpoints(self, name: str) -> CheckpointFolder:
        return CheckpointFolder(RunDir(self.folder / name).checkpoints)

    def product(self, name: str, stage: str = "train") -> dict[str, bytes]:
        """The bytes of every tensor in a stage's final checkpoint."""
        _, tensors = codec.encode(self.checkpoints(name).load(f"{stage}-end")["payload"])
        return {key: tensor.contiguous().view(torch.uint8).numpy().tobytes() for key, tensor in tensors.items()}
