"""Checks the arguments of data, model, task and weights before ranks connect and files are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_train import registry
from dist_train.config.data import is_weights_file
from dist_train.config.fit import FitConfig
from dist_train.config.stages import QATConfig
from dist_train.config.tree import Config
from dist_train.console.progress import check_epoch_format
from dist_train.data.datasets.builtin import check_args
from dist_train.errors import ConfigError, Problem, SetupError
from dist_train.models.build import check_model
from dist_train.pipeline.extension import check_extension, extends
from dist_train.quantization.backend import build_backend
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.paths import RunDir
from dist_train.tasks import Task
from dist_train.training.compilation import missing_compiler
from dist_train.training.evaluate import metric_names
from dist_train.training.optim_arguments import check_optim_and_schedule
from dist_train.training.selection import INT8


def check_arguments(config: Config) -> None:
    """Checks data.args, model.args, task.args and metrics, as far as possible without data.

    Raises:
        ConfigError: lists all mistakes.
        SetupError: a library or a compiler is missing.
    """
    problems: list[Problem] = []
    hints: list[str] = []
    checks: list[Callable[[], object]] = [
        lambda: check_args(config.data),
        lambda: check_model(config.model),
        lambda: registry.tasks.get(config.task.name)(2, config.task.args),
        lambda: _require_initial_weights(config),
        lambda: check_extension(config),
        lambda: _check_metrics_without_data(config),
        lambda: check_optim_and_schedule(config),
    ]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            hints += [error.hint] if error.hint else []
    if problems:
        raise ConfigError(problems, "; ".join(hints))
    if config.quantizes:
        build_backend(config.qat)  # raises if libraries or integer kernels are missing
    if config.compile is True and any(isinstance(getattr(config, stage, None), FitConfig) for stage in config.stages):
        _require_compiler(on_gpu=config.run.device != "cpu" and torch.cuda.is_available())


def _require_compiler(on_gpu: bool) -> None:
    """Raises SetupError without the compiler that torch.compile would ask for only at the first step."""
    missing = missing_compiler(on_gpu)
    if missing is not None:
        what, hint = missing
        raise SetupError(f"compile is true, and torch.compile finds {what}", f"{hint}, or --compile false")


def _check_metrics_without_data(config: Config) -> None:
    """Refuses metrics that are wrong for any number of classes. The number is not known yet, and top5 needs several."""
    make: Callable[[int, dict[str, Any]], Task] = registry.tasks.get(config.task.name)
    if _metric_problems(config, make(2, config.task.args)):
        check_metrics(config, make(1000, config.task.args))


def check_metrics(config: Config, task: Task) -> None:
    """Raises ConfigError if `select_by` or `log.epoch_format` names a metric that the task does not have."""
    problems = _metric_problems(config, task)
    if problems:
        raise ConfigError(problems)


def _metric_problems(config: Config, task: Task) -> list[Problem]:
    names = metric_names(task)
    problems = [] if config.log.epoch_format is None else check_epoch_format(config.log.epoch_format, names)
    for section in config.stages:
        settings = getattr(config, section, None)
        if not isinstance(settings, FitConfig):
            continue
        of_int8 = [f"{INT8}{name}" for name in names] if isinstance(settings, QATConfig) else []
        computed = (settings.select_by or "").startswith(INT8)  # int8 is evaluated for select_by alone
        for key, wanted, known in (
            ("select_by", settings.select_by, [*names, *of_int8]),
            ("schedule.metric", settings.schedule.metric, [*names, *(of_int8 if computed else [])]),
        ):
            if wanted is not None and wanted not in known:
                hint = f"the metrics are {', '.join(known)}"
                problems.append(Problem(f"{section}.{key}", f"{config.task.name} has no metric {wanted!r}", hint=hint))
    return problems


def holds_its_weights(config: Config, folder: CheckpointFolder) -> bool:
    """Tells whether checkpoints hold the model, of this run or of the one it extends: no initial weights are needed."""
    return config.stages[0] == "train" and (folder.latest is not None or extends(config))


def _no_file(weights: Path) -> Problem:
    """Describes a path of weights that is no file; names the files of weights in a folder."""
    if not weights.is_dir():
        hint = "give a .safetensors, .pt or .pth file"
        return Problem("model.weights", f"the file {weights} does not exist", hint=hint)
    if RunDir(weights).config.is_file():
        hint = f"--model.init_from {weights}, without model.weights"
        return Problem("model.weights", f"{weights} is the directory of a run", hint=hint)
    suffixes = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
    files = sorted(str(path) for path in weights.iterdir() if path.suffix in suffixes)[:4]
    hint = f"one of its files: {', '.join(files)}" if files else "give a file; there is none of weights in it"
    return Problem("model.weights", f"{weights} is a folder, not a file", hint=hint)


def _require_initial_weights(config: Config) -> None:
    """Raises ConfigError if the file or the run with the initial weights does not exist."""
    weights, other = config.model.weights, config.model.init_from
    if holds_its_weights(config, CheckpointFolder(RunDir(config.run_dir).checkpoints)):
        return
    if weights is not None and is_weights_file(weights) and not Path(weights).is_file():
        raise ConfigError([_no_file(Path(weights))])
    if other is not None and not RunDir(other).config.is_file() and not RunDir(other).checkpoints.is_dir():
        hint = "give the directory of a run that was trained, as in runs/NAME"
        raise ConfigError([Problem("model.init_from", f"{other} is not a run directory", hint=hint)])
