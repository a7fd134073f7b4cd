"""Builds what the stages of a run share, from the config."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train import registry
from dist_train.artifact.deployable import simulation
from dist_train.config.advice import too_many_workers
from dist_train.config.data import is_weights_file
from dist_train.config.stages import FitConfig, QATConfig
from dist_train.config.tree import Config
from dist_train.console.progress import Progress, check_epoch_format
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.args import cache_folder
from dist_train.data.datasets.builtin import check_args
from dist_train.data.loader import seed_everything
from dist_train.data.permutation import derive_key
from dist_train.data.splits import Splits, open_splits
from dist_train.data.stream import PROMISE
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DataError, Problem
from dist_train.models.build import build_model, check_model, initial_weights
from dist_train.models.fingerprint import FLOAT, SameModel
from dist_train.models.weights import digest, load_weights
from dist_train.pipeline.auto import Choices
from dist_train.pipeline.check_fit import try_out
from dist_train.quantization.backend import as_configuration, build_backend
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.paths import RunDir
from dist_train.stages.context import Context
from dist_train.tasks import Task
from dist_train.trackers.base import Trackers
from dist_train.training.evaluate import metric_names
from dist_train.training.selection import INT8

_QUANTIZES = {"ptq", "qat", "convert"}


def check_arguments(config: Config) -> None:
    """Checks data.args, model.args and task.args as far as it goes without data: before any rank waits and any file is written.

    Raises:
        ConfigError: with all mistakes.
    """
    problems: list[Problem] = []
    checks: list[Callable[[], object]] = [
        lambda: check_args(config.data),
        lambda: check_model(config.model),
        lambda: registry.tasks.get(config.task.name)(2, config.task.args),
        lambda: _require_initial_weights(config),
        lambda: _check_metrics_without_data(config),
    ]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    if _QUANTIZES & set(config.stages):
        build_backend(config.qat)  # the libraries and integer kernels that it needs are there


def _check_metrics_without_data(config: Config) -> None:
    """Refuses what is never right: some metrics (top5) want many classes, and how many there are is not known yet."""
    make: Callable[[int, dict[str, Any]], Task] = registry.tasks.get(config.task.name)
    if _metric_problems(config, make(2, config.task.args)):
        _check_metrics(config, make(1000, config.task.args))


def _check_metrics(config: Config, task: Task) -> None:
    """Raises ConfigError where a stage selects by a metric, or log.epoch_format shows one, that the task does not have."""
    problems = _metric_problems(config, task)
    if problems:
        raise ConfigError(problems)


def _metric_problems(config: Config, task: Task) -> list[Problem]:
    names = metric_names(task)
    problems = [] if config.log.epoch_format is None else check_epoch_format(config.log.epoch_format, names)
    for section in config.stages:
        settings = getattr(config, section, None)
        wanted = settings.select_by if isinstance(settings, FitConfig) else None
        known = [*names, *(f"{INT8}{name}" for name in names)] if isinstance(settings, QATConfig) else names
        if wanted is not None and wanted not in known:
            hint = f"the metrics are {', '.join(known)}"
            problems.append(Problem(f"{section}.select_by", f"{config.task.name} has no metric {wanted!r}", hint=hint))
    return problems


def make_context(
    config: Config,
    run_dir: RunDir,
    world: World,
    threads: int,
    progress: Progress,
    trackers: Trackers,
    ledger: Ledger | NoLedger,
    choices: Choices,
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
    folder = CheckpointFolder(run_dir.checkpoints)
    task: Task = registry.tasks.get(config.task.name)(splits.num_outputs, config.task.args)
    _check_metrics(config, task)
    try_out(config, model, splits, task, world)
    same_model = SameModel()
    same_model.require(FLOAT, model, torch.zeros(2, *splits.input_shape, device=world.device))
    weights = (
        None if _holds_its_weights(config, folder) else _load_initial_weights(config, model, splits, world, progress)
    )
    if _QUANTIZES & set(config.stages):
        # Once a run: a resume was checked when it began, and its fingerprint says whether it is the same model.
        example = torch.zeros(2, *splits.input_shape, device=world.device) if folder.latest is None else None
        with as_configuration():
            build_backend(config.qat).check(model, config.qat.rules, example)
        if bits := config.qat.simulated_bits:
            progress.say(f"int8: {simulation(bits)}")
    return Context(
        config=config,
        world=world,
        run_dir=run_dir,
        folder=folder,
        splits=splits,
        task=task,
        strategy=registry.strategies.get(choices.strategy)(world, choices.precision),
        trackers=trackers,
        ledger=ledger,
        progress=progress,
        model=model,
        threads=threads,
        same_model=same_model,
        results={
            "run": config.run.name,
            "world_size": world.world_size,
            "world_sizes": [],
            "stages": {},
            "models": {},
            "gates": {},
            **({} if weights is None else {"initial_weights": weights}),
        },
    )


def _splits(config: Config, world: World) -> Splits:
    make: Callable[[Any], Splits] = registry.datasets.get(config.data.name)
    return open_splits(lambda: make(config.data), cache_folder(config.data), world)


def advise(context: Context, warnings: Sequence[Problem]) -> None:
    """Says the warnings of the configuration, with those that need the data and the ranks; once, on rank 0."""
    world = context.world
    found = list(warnings)
    if not isinstance(context.splits.train, ImageArrays):
        cores = len(os.sched_getaffinity(0))
        found += too_many_workers(context.config.data.workers, world.local_world_size, cores)
    if context.config.sync_batchnorm and not any(isinstance(each, _BatchNorm) for each in context.model.modules()):
        message = f"does nothing: the model {context.config.model.name} has no BatchNorm"
        found.append(Problem("sync_batchnorm", message, hint="--sync_batchnorm false"))
    for problem in found:
        context.progress.warn(str(problem))


def _model(config: Config, splits: Splits, world: World) -> nn.Module:
    """The model with its first weights, a function of the seed alone, on the device."""
    channels = splits.input_shape[0]  # may read a sample, which may draw random numbers: before the seed
    seed_everything(derive_key("weights", config.run.seed))
    model = build_model(config.model, splits.num_outputs, channels)
    model = model.to(world.device)
    return model.to(memory_format=torch.channels_last) if config.model.channels_last else model


def _holds_its_weights(config: Config, folder: CheckpointFolder) -> bool:
    """The checkpoints of a run that began with training hold the model: what it started from may be gone by now."""
    return config.stages[0] == "train" and folder.latest is not None


def _require_initial_weights(config: Config) -> None:
    """Raises ConfigError where the file or the run that the model starts from is not there."""
    weights, other = config.model.weights, config.model.init_from
    if _holds_its_weights(config, CheckpointFolder(RunDir(config.run_dir).checkpoints)):
        return
    if weights is not None and is_weights_file(weights) and not Path(weights).is_file():
        hint = "give a .safetensors, .pt or .pth file"
        raise ConfigError([Problem("model.weights", f"the file {weights} does not exist", hint=hint)])
    if other is not None and not RunDir(other).config.is_file():
        hint = "give the directory of a run that was trained, as in runs/NAME"
        raise ConfigError([Problem("model.init_from", f"{other} is not a run directory", hint=hint)])


def _load_initial_weights(
    config: Config, model: nn.Module, splits: Splits, world: World, progress: Progress
) -> dict[str, str] | None:
    """Loads model.weights or model.init_from; returns what they were. Collective.

    Raises:
        DataError: they cannot be read, do not fit, or differ between nodes.
    """
    found = initial_weights(config.model)
    if found is None:
        return None
    source, read = found
    made: list[Mapping[str, torch.Tensor]] = []
    # Once on each node first: what has to be downloaded is in a cache of the node then.
    world.first_on_node(lambda: made.append(read()), f"reading the weights from {source}")
    state = made[0] if made else read()
    sha256 = digest(state)
    if len(set(world.gather(sha256))) > 1:
        raise DataError(f"{source} is not the same on all nodes", "give a path on a file system that all nodes share")
    notes = load_weights(model, state, source, splits.num_outputs)
    progress.say(f"model: starts from {source}" + "".join(f"; {note}" for note in notes))
    return {"source": source, "sha256": sha256}


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
