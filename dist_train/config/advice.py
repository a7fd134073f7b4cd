"""Warns of valid settings that are probably not meant, with what to type. Starts without importing torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_train.config.fit import FitConfig, steps_in
from dist_train.config.stages import QATConfig
from dist_train.config.tree import Config
from dist_train.errors import Problem

_BATCH = "data.global_batch_size"


def unscaled_rates(config: Config, sources: Mapping[str, str], batch_of_file: Any) -> Iterator[Problem]:
    """Warns where the command line changes the global batch size, and keeps the file's learning rate.

    Args:
        sources: dotted key -> source of its value; options begin with "--".
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
        if settings.optim.name.lower() != "sgd":
            message += (
                f", by the square root, which suits Adam (Malladi et al. 2022, arXiv:2205.10287), {lr * ratio**0.5:.6g}"
            )
        hint = f"--{key} {linear:.6g}, or --{section}.optim.base_batch_size {batch_of_file}; to keep it, --{key} {lr:g}"
        yield Problem(key, message, sources[key], hint)


def unexpanded_paths(config: Config, sources: Mapping[str, str]) -> Iterator[Problem]:
    """Warns of paths that begin with ~ or $: they are taken as they are, and no shell has expanded them."""
    for key in sources:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        if isinstance(value, Path) and str(value)[:1] in ("~", "$"):
            message = f"{value} is taken as it is: a folder of that name, here"
            yield Problem(key, message, sources[key], f'let the shell expand it: --{key} "$HOME/..."')


def too_many_workers(workers: int | str, local_ranks: int, cores: int) -> Iterator[Problem]:
    """Warns of more worker processes than cores that this process may use."""
    if isinstance(workers, int) and workers * local_ranks > max(cores, local_ranks):
        ranks = f" for each of {local_ranks} ranks" if local_ranks > 1 else ""
        where = f"on the {cores} core{'s' if cores > 1 else ''} of this node"
        message = f"{workers} worker processes{ranks} {where} slow each other down"
        yield Problem("data.workers", message, hint=f"--data.workers {max(1, cores // local_ranks)}, or auto")


def little_shared_memory(workers: int, prefetched: int, free: int) -> Iterator[Problem]:
    """Warns of worker processes whose batches may not fit into shared memory.

    workers: of this node.
    prefetched: bytes that their batches take at most.
    free: free bytes of shared memory.
    """
    if prefetched > free:
        message = (
            f"the batches of {workers} worker processes may take {prefetched / 2**20:.0f} MiB of shared memory, and "
            f"/dev/shm has {free / 2**20:.0f} MiB free"
        )
        yield Problem("data.workers", message, hint="docker run --shm-size=8g (or --ipc=host); or fewer --data.workers")


def clipping_undone(config: Config) -> Iterator[Problem]:
    """Warns of ranges that ptq clips, and that qat's observer moves back to the extremes of its steps."""
    if config.ptq.ranges != "min_max" and config.qat.freeze_ranges > 0:
        how = "widens to" if config.qat.observer == "min_max" else "moves towards"
        moved = f"qat's observer {how} each step's smallest and largest value"
        message = f"{config.ptq.ranges}: the ranges are clipped, but {moved}"
        yield Problem("ptq.ranges", message, hint="--qat.freeze_ranges 0 keeps the clipped ones")


def idle_settings(section: str, settings: FitConfig, epochs: int, steps_per_epoch: int) -> Iterator[Problem]:
    """Warns of settings that have no effect in so few steps, or take effect from the first step."""
    total, schedule = epochs * steps_per_epoch, settings.schedule
    few = f"of {total} step{'s' if total > 1 else ''}"
    more = f"more --{section}.epochs"
    if schedule.warmup and not steps_in(schedule.warmup, total):
        message = f"{schedule.warmup:g} {few} is less than one: there is no warm-up"
        yield Problem(
            f"{section}.schedule.warmup", message, hint=f"--{section}.schedule.warmup {1 / total:.2g}, or {more}"
        )
    if schedule.name == "step" and schedule.step_epochs >= epochs:
        message = f"{schedule.step_epochs:g} is not less than the stage's {epochs} epochs: the rate never decays"
        yield Problem(f"{section}.schedule.step_epochs", message, hint=f"lower it, or {more}")
    stopping = settings.early_stopping
    evaluations = -(-epochs // settings.evaluate_every)
    if stopping is not None and stopping.patience + 1 >= evaluations:
        message = f"{stopping.patience} is too large for the stage's {evaluations} evaluations: it never stops early"
        yield Problem(f"{section}.early_stopping.patience", message, hint=f"lower it, or {more}")
    if not isinstance(settings, QATConfig):
        return
    for name, what in (("freeze_batch_norm", "BatchNorm's statistics"), ("freeze_ranges", "the ranges")):
        fraction = getattr(settings, name)
        if fraction and not steps_in(fraction, total):
            message = f"{fraction:g} {few} is less than one: {what} are frozen from the first step"
            yield Problem(f"{section}.{name}", message, hint=f"--{section}.{name} 1, to freeze nothing, or {more}")
