"""Settings that are right and yet probably not meant: each gets a warning with what to type. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dist_train.config.stages import FitConfig, QATConfig, steps_in
from dist_train.config.tree import Config
from dist_train.errors import Problem

_BATCH = "data.global_batch_size"


def unscaled_rates(config: Config, sources: Mapping[str, str], batch_of_file: Any) -> Iterator[Problem]:
    """A global batch changed on the command line, while a learning rate stayed what it was for the file's.

    Args:
        sources: dotted key -> where its value came from; options begin with "--".
        batch_of_file: data.global_batch_size without the options.
    """
    batch = config.data.global_batch_size
    if not sources[_BATCH].startswith("--") or batch == batch_of_file or not isinstance(batch_of_file, int):
        return
    for section in config.stages:
        settings = getattr(config, section, None)
        if not isinstance(settings, FitConfig) or settings.optim.base_batch_size is not None:
            continue
        key, lr = f"{section}.optim.lr", settings.optim.lr
        if sources[key].startswith("--"):
            continue
        linear, ratio = lr * batch / batch_of_file, batch / batch_of_file
        message = (
            f"stayed {lr:g}, while {_BATCH} was {batch_of_file} and is {batch}; "
            f"scaled linearly (Goyal et al. 2017) it would be {linear:.6g}"
        )
        if settings.optim.name != "sgd":
            message += (
                f", by the square root, which suits Adam (Malladi et al. 2022, arXiv:2205.10287), {lr * ratio**0.5:.6g}"
            )
        hint = f"--{key} {linear:.6g}, or --{section}.optim.base_batch_size {batch_of_file}; to keep it, --{key} {lr:g}"
        yield Problem(key, message, sources[key], hint)


def too_many_workers(workers: int | str, local_ranks: int, cores: int) -> Iterator[Problem]:
    """Worker processes that were asked for by number, beyond the cores that this process may use."""
    if isinstance(workers, int) and workers * local_ranks > max(cores, local_ranks):
        ranks = f" for each of {local_ranks} ranks" if local_ranks > 1 else ""
        message = f"{workers} worker processes{ranks} on the {cores} core{'s' if cores > 1 else ''} of this node slow each other down"
        yield Problem("data.workers", message, hint=f"--data.workers {max(1, cores // local_ranks)}, or auto")


def clipping_undone(config: Config) -> Iterator[Problem]:
    """Ranges that ptq clips and qat's observer then moves back to the extremes of its steps."""
    if config.ptq.ranges != "min_max" and config.qat.freeze_ranges > 0:
        how = "widens to" if config.qat.observer == "min_max" else "moves towards"
        message = f"{config.ptq.ranges}: the ranges are clipped, but qat's observer {how} each step's smallest and largest value"
        yield Problem("ptq.ranges", message, hint="--qat.freeze_ranges 0 keeps the clipped ones")


def idle_settings(section: str, settings: FitConfig, epochs: int, steps_per_epoch: int) -> Iterator[Problem]:
    """Settings of a stage that do nothing in so few steps, or all too early."""
    total, schedule = epochs * steps_per_epoch, settings.schedule
    few = f"of {total} step{'s' if total > 1 else ''}"
    more = f"more --{section}.epochs"
    if schedule.warmup and not steps_in(schedule.warmup, total):
        message = f"{schedule.warmup:g} {few} is less than one: there is no warm-up"
        yield Problem(
            f"{section}.schedule.warmup", message, hint=f"--{section}.schedule.warmup {1 / total:.2g}, or {more}"
        )
    if schedule.name == "step" and schedule.step_epochs >= epochs:
        message = f"{schedule.step_epochs:g} epochs are not over before the stage's {epochs} are: the rate never decays"
        yield Problem(f"{section}.schedule.step_epochs", message, hint=f"lower it, or {more}")
    stopping = settings.early_stopping
    evaluations = -(-epochs // settings.evaluate_every)
    if stopping is not None and stopping.patience + 1 >= evaluations:
        message = f"{stopping.patience} evaluations after the first are not over before the stage's {evaluations} are: it never stops early"
        yield Problem(f"{section}.early_stopping.patience", message, hint=f"lower it, or {more}")
    if not isinstance(settings, QATConfig):
        return
    for name, what in (("freeze_batch_norm", "BatchNorm's statistics"), ("freeze_ranges", "the ranges")):
        fraction = getattr(settings, name)
        if fraction and not steps_in(fraction, total):
            message = f"{fraction:g} {few} is less than one: {what} stand still from the first step"
            yield Problem(f"{section}.{name}", message, hint=f"--{section}.{name} 1, to freeze nothing, or {more}")
