"""Runs of the real training loop on small models and data."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.checks.strategy import Precision
from dist_train.config.data import MixConfig
from dist_train.config.fit import FitConfig
from dist_train.config.tree import Config
from dist_train.console.progress import Progress
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.mix import Mix
from dist_train.data.augment.steps import Augmentation
from dist_train.data.dynamic import Dynamic
from dist_train.data.loader import EvaluationLoader, Source, TrainLoader
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.data.stack import Collate
from dist_train.distributed.world import World
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.ranges import Ranges
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.paths import RunDir
from dist_train.strategies.base import Strategy
from dist_train.strategies.ddp import DDP
from dist_train.strategies.fsdp import FSDP
from dist_train.strategies.single import Single
from dist_train.tasks import Classification, Task
from dist_train.trackers.base import Tracker, Trackers
from dist_train.training.compilation import Compiled, Uncompiled
from dist_train.training.evaluate import Evaluation, evaluate
from dist_train.training.hooks import Hook
from dist_train.training.learner import Learner
from dist_train.training.loop import Fit
from dist_train.training.profiler import NoProfile
from dist_train.training.reduction import StepReduction
from dist_train.training.rounds import Together

CLASSES = 4


def arrays(size: int, seed: int = 0) -> ImageArrays:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, CLASSES, (size,), generator=generator)
    images = torch.randint(0, 120, (size, 1, 4, 4), generator=generator) + 40 * targets.view(-1, 1, 1, 1).clamp(max=3)
    return ImageArrays(images.clamp(max=255).to(torch.uint8), targets)


def mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, CLASSES))


def normed() -> nn.Module:
    """A network with BatchNorm and with ranges of activations."""
    torch.manual_seed(1)
    first = ActivationFakeQuantize()
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        first,
        nn.ReLU(),
        ActivationFakeQuantize(),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


class Draws(nn.Module):
    """Records what each training forward draws from the global generator, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(1)))
        return x


class Recorder(Tracker):
    """A tracker that keeps its scalars."""

    def __init__(self) -> None:
        super().__init__(RunDir(Path()), "recorded", 0)
        self.lines: list[dict[str, Any]] = []

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        self.lines.append({"epoch": epoch, "step": step, **scalars})

    def of(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]


class Memory:
    """Keeps the newest and the best checkpoint in memory."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}
        self.saved: list[int] = []

    def save_step(
        self, stage: str, step: int, state: dict[str, Any], best_first: Sequence[int], needed: int | None
    ) -> None:
        self.states = {kept: value for kept, value in self.states.items() if kept == needed}
        self.states[step] = copy.deepcopy(state)
        self.saved.append(step)

    def settle(self) -> None:
        return

    def load_step(self, stage: str, step: int) -> dict[str, Any]:
        return copy.deepcopy(self.states[step])


class Watch:
    """A hook that keeps the value of `look` before each step."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self._look = look
        self.seen: list[Any] = []

    def before_step(self, step: int) -> None:
        self.seen.append(self._look())


class Given(Learner):
    """A learner of given parts."""

    def __init__(
        self,
        model: nn.Module,
        reduction: StepReduction,
        hooks: Sequence[Hook],
        evaluate: Callable[[nn.Module], Evaluation],
        recalibrate: Callable[[nn.Module], None],
    ) -> None:
        super().__init__(model, reduction)
        self._hooks, self._evaluate, self._recalibrate = hooks, evaluate, recalibrate

    def hooks(self, total_steps: int) -> Sequence[Hook]:
        return self._hooks

    def evaluate(self, model: nn.Module) -> Evaluation:
        return self._evaluate(model)

    def recalibrate(self, averaged: nn.Module) -> None:
        self._recalibrate(averaged)


@dataclass
class Made:
    run: Fit
    recorder: Recorder = field(default_factory=Recorder)
    memory: Memory = field(default_factory=Memory)


def make(
    world: World,
    model: nn.Module,
    *,
    size: int = 37,
    batch: int = 10,
    micro: int | None = None,
    joint_micro: int | None = None,
    epochs: int = 2,
    config: Mapping[str, Any] | None = None,
    hooks: Sequence[Hook] = (),
    task: Task | None = None,
    precision: Precision = "fp32",
    strategy_class: type[Strategy] | None = None,
    ledger: Ledger | NoLedger | None = None,
    compile: bool = False,
    checkpoint_every: int | None = None,
    log_every: int = 1,
    evaluate_with: Callable[[nn.Module], Evaluation] | None = None,
    recalibrate: Callable[[nn.Module], None] = lambda averaged: None,
    dataset: Dataset[Any] | None = None,
    mix: MixConfig | None = None,
    collate: Collate | None = None,
    dynamic: Dynamic | None = None,
) -> Made:
    """A run of the loop over `size` samples, by SGD at 0.1 with momentum unless `config` (of FitConfig) changes it.

    joint_micro: the same number of micro-batches on each rank.
    """
    data, augmentation = (
        arrays(size) if dataset is None else dataset,
        Augmentation([], seed=0, mean=(0.5,), std=(0.25,)),
    )
    streamed = isinstance(data, IterableDataset)
    source = Source(
        data,
        augmentation,
        world.device,
        False,
        0,
        0,
        skip_corrupt=True,
        size=size if streamed else None,
        collate=collate,
        dynamic=dynamic,
    )
    sampler = ElasticDistributedSampler(
        range(size),
        world.world_size,
        world.rank,
        shuffle=not streamed,
        seed=5,
        global_batch_size=batch,
        micro_batch_size=joint_micro,
    )
    loader = TrainLoader(source, sampler, micro, Mix(mix, 5) if mix else None, alike=strategy_class is FSDP)
    strategy = (strategy_class or (DDP if world.world_size > 1 else Single))(world, precision)
    chosen_task = task or Classification(CLASSES, {})
    ranges = Ranges(model)
    recorder, memory = Recorder(), Memory()

    def evaluation(chosen: nn.Module) -> Evaluation:
        # As in the stage: the evaluation set must not change the ranges.
        quantizers = [module for module in chosen.modules() if isinstance(module, ActivationFakeQuantize)]
        for quantizer in quantizers:
            quantizer.observing = False
        with strategy.unsharded(chosen):
            found = evaluate(chosen, EvaluationLoader(source, 16, world.world_size, world.rank), chosen_task, world)
        for quantizer in quantizers:
            quantizer.observing = True
        return found

    settings = FitConfig.model_validate({"epochs": epochs, "optim": {"lr": 0.1}, **(config or {})})
    whole = Config.model_validate(
        {
            "run": {"seed": 7},
            "checkpoint": {"every_steps": checkpoint_every},
            "log": {"every_steps": log_every},
        }
    )
    reduction = StepReduction(world, model, ranges if len(ranges) else None, 0.1)
    run = Fit(
        stage="train",
        config=whole,
        settings=settings,
        epochs=epochs,
        steps_per_epoch=loader.steps_per_epoch,
        loader=loader,
        rounds=Together(loader, loader.steps_per_epoch),
        example=source.copies(2),
        task=chosen_task,
        strategy=strategy,
        compilation=Compiled() if compile else Uncompiled(),
        learner=Given(model, reduction, hooks, evaluate_with or evaluation, recalibrate),
        checkpoints=memory,
        ledger=ledger or NoLedger(),
        trackers=Trackers([recorder]),
        progress=Progress(False, 1.0, io.StringIO()),
        profile=NoProfile(),
    )
    return Made(run, recorder, memory)


def flat(model: nn.Module) -> list[float]:
    """All parameters, concatenated."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
