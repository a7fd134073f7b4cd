"""Builds what the stages of a run share, from the config."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_train import registry
from dist_train.checkpoint import CheckpointFolder
from dist_train.config import Config
from dist_train.data.arguments import cache_folder
from dist_train.data.arrays import Splits, open_splits
from dist_train.data.datasets import check_args
from dist_train.data.loader import seed_everything
from dist_train.data.permutation import derive_key
from dist_train.data.stream import PROMISE
from dist_train.errors import ConfigError, DataError, Problem
from dist_train.ledger import Ledger, NoLedger
from dist_train.models.build import build_model, model_arguments
from dist_train.progress import Progress
from dist_train.run_dir import RunDir
from dist_train.stages.base import Context
from dist_train.strategies.base import Strategy
from dist_train.tasks import Task
from dist_train.trackers.base import Trackers
from dist_train.world import World


def check_arguments(config: Config) -> None:
    """Checks data.args, model.args and task.args as far as it goes without data: before any rank waits and any file is written.

    Raises:
        ConfigError: with all mistakes.
    """
    problems: list[Problem] = []
    checks: list[Callable[[], object]] = [
        lambda: check_args(config.data),
        lambda: model_arguments(config.model, num_classes=2, in_channels=1),
        lambda: registry.tasks.get(config.task.name)(2, config.task.args),
    ]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def make_context(
    config: Config,
    run_dir: RunDir,
    world: World,
    threads: int,
    progress: Progress,
    trackers: Trackers,
    ledger: Ledger | NoLedger,
) -> Context:
    """Data, model, task and strategy as the config names them. Collective."""
    splits = _splits(config, world)
    if splits.steps_per_epoch is not None:
        if config.debug.ledger:
            raise DataError(
                "the training data is a stream, whose items have no ids that a ledger could hold",
                "--debug.ledger false, or a map-style dataset",
            )
        progress.say(PROMISE)
    model = _model(config, splits, world)
    task: Task = registry.tasks.get(config.task.name)(splits.num_classes, config.task.args)
    _try_out(model, splits, task, world)
    return Context(
        config=config,
        world=world,
        run_dir=run_dir,
        folder=CheckpointFolder(run_dir.checkpoints),
        splits=splits,
        task=task,
        strategy=_strategy(config, world),
        trackers=trackers,
        ledger=ledger,
        progress=progress,
        model=model,
        threads=threads,
        results={
            "run": config.run.name,
            "world_size": world.world_size,
            "world_sizes": [],
            "stages": {},
            "models": {},
            "gates": {},
        },
    )


def _splits(config: Config, world: World) -> Splits:
    make: Callable[[Any], Splits] = registry.datasets.get(config.data.name)
    return open_splits(lambda: make(config.data), cache_folder(config.data), world)


def _model(config: Config, splits: Splits, world: World) -> nn.Module:
    """The model with its first weights, a function of the seed alone, on the device."""
    channels = splits.input_shape[0]  # may read a sample, which may draw random numbers: before the seed
    seed_everything(derive_key("weights", config.run.seed))
    model = build_model(config.model, splits.num_classes, channels)
    model = model.to(world.device)
    return model.to(memory_format=torch.channels_last) if config.model.channels_last else model


@torch.no_grad()
def _try_out(model: nn.Module, splits: Splits, task: Task, world: World) -> None:
    """One forward of zeros, so that a head that does not fit the data is found now and not after an epoch."""
    outputs = model.eval()(torch.zeros(2, *splits.input_shape, device=world.device))
    if not isinstance(outputs, torch.Tensor):
        raise DataError(
            f"the model returns a {type(outputs).__name__}, not a tensor", "return the logits alone from its forward"
        )
    task.check_outputs(outputs)


def _strategy(config: Config, world: World) -> Strategy:
    name = config.strategy if config.strategy != "auto" else "ddp"
    if name == "ddp" and world.world_size == 1:
        name = "single"
    strategy: Strategy = registry.strategies.get(name)(world, config.precision)
    return strategy


def configure_torch(config: Config, threads: int) -> None:
    """Threads, determinism, and the warnings that mean nothing here."""
    torch.set_num_threads(threads)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    # SequentialLR's own way of starting its schedules, and weights whose strides can be read as both memory formats.
    for message in (
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        "The epoch parameter in `scheduler.step",
        "Grad strides do not match bucket view strides",
    ):
        warnings.filterwarnings("ignore", message=message)
