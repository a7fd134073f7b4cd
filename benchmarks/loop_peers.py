"""The loops that benchmarks/loop.py compares: `python loop_peers.py NAME STEPS WARM_UP ROWS`, or under torchrun.

Each trains the same MLP by the same optimizer and schedule on the same data and prints, on rank 0, its milliseconds per
step after the first WARM_UP steps.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
BATCH, LR, MOMENTUM, READ_EVERY = 32, 0.05, 0.9, 100


class Clock:
    """Counts steps; notes the time after `warm_up` and after `warm_up` + `steps`."""

    def __init__(self, steps: int, warm_up: int) -> None:
        self.last, self._warm_up, self._steps, self.done = steps + warm_up, warm_up, steps, 0

    def step(self) -> None:
        self.done += 1
        if self.done == self._warm_up:
            self._began = time.perf_counter()
        elif self.done == self.last and RANK == 0:
            print(f"ms per step {1000 * (time.perf_counter() - self._began) / self._steps}", flush=True)

    @property
    def over(self) -> bool:
        return self.done >= self.last


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def tensors(rows: int) -> tuple[Tensor, Tensor]:
    """Normalized images, float32 [N, 1, 28, 28], and targets, int64 [N]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, 28, 28, generator=generator), torch.randint(10, (rows,), generator=generator)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)


def cosine(optimizer: torch.optim.Optimizer, clock: Clock) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, clock.last)


def loader(rows: int, sharded: bool = True) -> DataLoader[Any]:
    data = TensorDataset(*tensors(rows))
    sampler: DistributedSampler[Any] | None
    sampler = DistributedSampler(data, WORLD, RANK) if WORLD > 1 and sharded else None
    return DataLoader(data, batch_size=BATCH, sampler=sampler, shuffle=sampler is None, drop_last=True)


def endless(batches: Any) -> Iterator[Any]:
    epoch, sampler = 0, getattr(batches, "sampler", None)
    while True:
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        yield from batches
        epoch += 1


def train(
    net: nn.Module, optimizer: Any, batches: Iterator[Any], clock: Clock, backward: Callable[[Tensor], None]
) -> None:
    """The loop itself, for all who leave it to the user; `net` and `optimizer` may be wrapped."""
    schedule = cosine(getattr(optimizer, "optimizer", optimizer), clock)
    for images, targets in batches:
        loss = F.cross_entropy(net(images), targets)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        schedule.step()
        clock.step()
        if clock.done % READ_EVERY == 0:
            loss.item()
        if clock.over:
            return


def by_hand(batches: Iterator[Any], clock: Clock) -> None:
    if WORLD > 1:
        dist.init_process_group("gloo")
    net = model()
    wrapped = DistributedDataParallel(net) if WORLD > 1 else net
    train(wrapped, sgd(net), batches, clock, lambda loss: loss.backward())
    if WORLD > 1:
        dist.destroy_process_group()


def indexed(rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, targets = tensors(rows)
    generator = torch.Generator().manual_seed(0)
    while True:
        for picked in torch.randperm(rows, generator=generator).view(-1, WORLD, BATCH)[:, RANK]:
            yield images[picked], targets[picked]


def accelerate(rows: int, clock: Clock) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = model()
    net, optimizer, batches = accelerator.prepare(net, sgd(net), loader(rows, sharded=False))
    train(net, optimizer, endless(batches), clock, accelerator.backward)


def fabric(rows: int, clock: Clock) -> None:
    from lightning.fabric import Fabric

    engine = Fabric(accelerator="cpu", devices=WORLD, strategy="ddp" if WORLD > 1 else "auto")
    engine.launch()
    net = model()
    net, optimizer = engine.setup(net, sgd(net))
    batches = engine.setup_dataloaders(loader(rows, sharded=False))
    train(net, optimizer, endless(batches), clock, engine.backward)


def lightning(rows: int, clock: Clock) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self)
            return [optimizer], [{"scheduler": cosine(optimizer, clock), "interval": "step"}]

        def on_train_batch_end(self, *_: Any) -> None:
            clock.step()

    trainer = L.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp" if WORLD > 1 else "auto",
        max_steps=clock.last,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader(rows, sharded=False))


def ignite(rows: int, clock: Clock) -> None:
    import ignite.distributed as idist
    from ignite.engine import Engine, Events

    def training(_: int) -> None:
        net = idist.auto_model(model())
        optimizer = idist.auto_optim(sgd(net))
        schedule = cosine(optimizer, clock)

        def step(_: Engine, batch: Any) -> Tensor:
            loss = F.cross_entropy(net(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            return loss

        engine = Engine(step)

        @engine.on(Events.ITERATION_COMPLETED)
        def count(engine: Engine) -> None:
            clock.step()
            if clock.over:
                engine.terminate()

        batches = loader(rows)
        engine.run(batches, max_epochs=-(-clock.last // len(batches)))

    with idist.Parallel(backend="gloo" if WORLD > 1 else None) as parallel:
        parallel.run(training)


def transformers(rows: int, clock: Clock) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(Dataset[Any]):
        def __init__(self) -> None:
            self.images, self.targets = tensors(rows)

        def __len__(self) -> int:
            return rows

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"images": self.images[index], "labels": self.targets[index]}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.net(images), labels)}

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=clock.last,
            per_device_train_batch_size=BATCH,
            logging_steps=READ_EVERY,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_grad_norm=0.0,
        )
        net = Net()
        optimizer = sgd(net)
        Trainer(
            net,
            arguments,
            train_dataset=Rows(),
            callbacks=[Count()],
            # A schedule is wider than the Trainer's type says; an ignore would be unused where transformers is absent.
            optimizers=cast(Any, (optimizer, cosine(optimizer, clock))),
        ).train()


LOOPS: dict[str, Callable[[int, Clock], None]] = {
    "tensors": lambda rows, clock: by_hand(indexed(rows), clock),
    "dataloader": lambda rows, clock: by_hand(endless(loader(rows)), clock),
    "accelerate": accelerate,
    "fabric": fabric,
    "lightning": lightning,
    "ignite": ignite,
    "transformers": transformers,
}

if __name__ == "__main__":
    name, steps, warm_up, rows = sys.argv[1], *map(int, sys.argv[2:5])
    torch.manual_seed(RANK)
    torch.set_num_threads(1)
    LOOPS[name](rows, Clock(steps, warm_up))
