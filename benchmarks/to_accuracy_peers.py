"""The peers of benchmarks/to_accuracy.py: a rank's program, started by torchrun with its settings as JSON.

Both train the same model by the same schedule on the same files, in float32, and write a line (seconds since 1970,
accuracy) for each evaluation.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms

from dist_train.models.small import small_resnet

LR, DECAY, WARM_UP = 0.2, 5e-4, 0.1  # those of configs/fashion_mnist.yaml


def datasets(root: str) -> tuple[Any, Any]:
    last = [
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize((0.2860,), (0.3530,)),
    ]
    first = [transforms.RandomCrop(28, padding=2), transforms.RandomHorizontalFlip()]
    train = torchvision.datasets.FashionMNIST(root, train=True, transform=transforms.Compose([*first, *last]))
    return train, torchvision.datasets.FashionMNIST(root, train=False, transform=transforms.Compose(last))


def optimizer(model: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Returns SGD that decays no norms and biases, and a linear warm-up with a cosine after it, by step."""
    decayed = [each for each in model.parameters() if each.dim() > 1]
    spared = [each for each in model.parameters() if each.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": spared, "weight_decay": 0.0}]
    made = torch.optim.SGD(groups, lr=LR, momentum=0.9)
    rise = max(1, round(WARM_UP * total_steps))

    def factor(step: int) -> float:
        if step < rise:
            return 0.01 + 0.99 * step / rise
        return (1 + math.cos(math.pi * (step - rise) / max(1, total_steps - rise))) / 2

    return made, LambdaLR(made, factor)


def note(told: dict[str, Any], accuracy: float) -> None:
    with Path(told["out"]).open("a") as file:
        print(json.dumps([time.time(), accuracy]), file=file)


def script(told: dict[str, Any]) -> None:
    """The manner of torchvision's references/classification: DistributedDataParallel, DataLoader, a file an epoch."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    train, test = datasets(told["root"])
    sampler: DistributedSampler[Any] = DistributedSampler(train)
    loader = DataLoader(train, told["batch"] // size, sampler=sampler, num_workers=told["workers"])
    testing = DataLoader(test, 1000, sampler=DistributedSampler(test, shuffle=False), num_workers=told["workers"])
    model = small_resnet(10, 1)
    wrapped = DistributedDataParallel(model)
    sgd, schedule = optimizer(model, told["epochs"] * len(loader))
    for epoch in range(told["epochs"]):
        sampler.set_epoch(epoch)
        wrapped.train()
        for images, targets in loader:
            loss = F.cross_entropy(wrapped(images), targets)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
            loss.item()  # its MetricLogger reads the loss of each step
        wrapped.eval()
        right = torch.zeros(2)
        with torch.inference_mode():
            for images, targets in testing:
                right += torch.tensor([(wrapped(images).argmax(1) == targets).sum(), len(targets)])
        dist.all_reduce(right)
        if rank == 0:
            note(told, float(right[0] / right[1]))
            torch.save({"model": model.state_dict(), "optimizer": sgd.state_dict()}, told["out"] + ".pth")
    dist.destroy_process_group()


def lightning(told: dict[str, Any]) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_resnet(10, 1)
            self.right = torch.zeros(2)

        def training_step(self, batch: Any, number: int) -> Tensor:
            images, targets = batch
            return F.cross_entropy(self.model(images), targets)

        def validation_step(self, batch: Any, number: int) -> None:
            images, targets = batch
            self.right += torch.tensor([(self.model(images).argmax(1) == targets).sum(), len(targets)])

        def on_validation_epoch_end(self) -> None:
            right = self.trainer.strategy.reduce(self.right, reduce_op="sum")
            if self.trainer.is_global_zero:
                note(told, float(right[0] / right[1]))
            self.right = torch.zeros(2)

        def configure_optimizers(self) -> Any:
            sgd, schedule = optimizer(self.model, int(self.trainer.estimated_stepping_batches))
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    size = int(os.environ["WORLD_SIZE"])
    train, test = datasets(told["root"])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp",
        max_epochs=told["epochs"],
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=told["out"] + ".lightning",
    )
    workers = told["workers"]
    loader = DataLoader(train, told["batch"] // size, shuffle=True, num_workers=workers)
    trainer.fit(Module(), loader, DataLoader(test, 1000, num_workers=workers))


if __name__ == "__main__":
    torch.manual_seed(json.loads(sys.argv[2])["seed"])
    {"script": script, "lightning": lightning}[sys.argv[1]](json.loads(sys.argv[2]))
