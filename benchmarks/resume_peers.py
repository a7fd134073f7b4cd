"""The parts of benchmarks/resume.py: rows that take no memory, for all methods, and the programs of the peers' ranks.

A program's settings are JSON. Rank 0 writes a line (seconds since 1970, step) after each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import dist_train
from dist_train.models.small import mlp


class Rows(Dataset[Any]):
    """Images that are made of their number."""

    input_shape = (1, 8, 8)

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full(self.input_shape, index % 97 / 97), index % 10


@dist_train.register_dataset("numbered_rows")
def numbered_rows(data: dist_train.DataConfig) -> dist_train.Splits:
    return dist_train.Splits(Rows(data.args["rows"]), Rows(256), 10)


def note(told: dict[str, Any], step: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        with Path(told["out"]).open("a") as file:
            print(json.dumps([time.time(), step]), file=file)


def loader_of(told: dict[str, Any]) -> DataLoader[Any]:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return DataLoader(Rows(told["rows"]), told["batch"] // size, shuffle=True, num_workers=1)


def accelerate(told: dict[str, Any]) -> None:
    """The way of accelerate's guide: load_state, and skip_first_batches of the epoch that was interrupted."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    model = mlp(10, 1, size=8)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model, sgd, loader = accelerator.prepare(model, sgd, loader_of(told))
    folder, step = Path(told["folder"]), 0
    newest = folder / "newest.json"
    if newest.exists():
        step = json.loads(newest.read_text())
        accelerator.load_state(str(folder / f"step-{step}"))
    while True:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for images, targets in accelerator.skip_first_batches(loader, done) if done else loader:
            accelerator.backward(F.cross_entropy(model(images), targets))
            sgd.step()
            sgd.zero_grad()
            step += 1
            note(told, step)
            if step % told["interval"] == 0:
                accelerator.save_state(str(folder / f"step-{step}"))
                if accelerator.is_main_process:
                    newest.write_text(json.dumps(step))


def lightning(told: dict[str, Any]) -> None:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp(10, 1, size=8)

        def training_step(self, batch: Any, number: int) -> Tensor:
            images, targets = batch
            return F.cross_entropy(self.model(images), targets)

        def on_train_batch_end(self, *_: Any) -> None:
            note(told, self.trainer.global_step)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    folder = Path(told["folder"])
    keep = ModelCheckpoint(dirpath=folder, every_n_train_steps=told["interval"], save_last=True, save_top_k=1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        max_epochs=1000,
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(Module(), loader_of(told), ckpt_path=str(last) if last.exists() else None)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"accelerate": accelerate, "lightning": lightning}[sys.argv[1]](json.loads(sys.argv[2]))
