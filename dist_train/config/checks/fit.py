"""Checks of a stage's optimizer and schedule, and of what it freezes."""

from __future__ import annotations

from collections.abc import Iterator

from dist_train.config.checks.base import ignored
from dist_train.config.fit import FitConfig, Match
from dist_train.config.tree import Config
from dist_train.errors import Problem

_SETTINGS = ("momentum", "nesterov", "betas", "eps")
_BY_MATRIX = ("Adafactor", "Muon")


def shard_problems(section: str, settings: FitConfig) -> Iterator[Problem]:
    """Yields optimizers that cannot take a step of parameters in shards."""
    optim, place = settings.optim, f"{section}.optim"
    named = {f"{place}.name": optim.name}
    named |= {f"{place}.groups.{number}.name": group.name for number, group in enumerate(optim.groups) if group.name}
    for where, name in named.items():
        if name in _BY_MATRIX:
            message = f"{name} computes by whole matrices, which strategy fsdp cuts"
            yield Problem(where, message, hint="adamw there, or --strategy ddp")


def optim_problems(section: str, settings: FitConfig) -> Iterator[Problem]:
    """Yields settings that the optimizer does not use, and groups that change nothing."""
    optim, place = settings.optim, f"{section}.optim"
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        yield Problem(f"{place}.nesterov", "needs a momentum above 0", hint=f"--{place}.momentum 0.9")
    if optim.own:
        yield from ignored(place, optim, ("betas", "eps") if optim.name == "sgd" else ("momentum", "nesterov"))
        if optim.args:
            hint = f"--{place}.name with a class of torch.optim, or {place}.{next(iter(optim.args))} without args"
            yield Problem(f"{place}.args", f"is ignored by {optim.name!r}, whose settings are beside it", hint=hint)
    else:
        for problem in ignored(place, optim, _SETTINGS):
            name = problem.place.rpartition(".")[2]
            yield Problem(problem.place, problem.message, hint=f"{place}.args: {{{name}: ...}}, or remove it")
    for number, group in enumerate(optim.groups):
        others = (group.lr, group.weight_decay, group.decay_norm_and_bias)
        if group.name in (None, optim.name) and all(each is None for each in others) and not group.args:
            hint = "give it name, lr, weight_decay, decay_norm_and_bias or args, or remove it"
            yield Problem(f"{place}.groups.{number}", "changes nothing", hint=hint)


def schedule_problems(section: str, settings: FitConfig) -> Iterator[Problem]:
    """Yields settings that the schedule does not use."""
    schedule, place = settings.schedule, f"{section}.schedule"
    if schedule.own:
        used = {"step": ("step_epochs", "gamma"), "constant": ()}.get(schedule.name, ("final",))
        unused = [name for name in ("final", "step_epochs", "gamma") if name not in used]
        yield from ignored(place, schedule, [*unused, "args", "every", "metric"])
        return
    unused = ["final", "step_epochs", "gamma"]
    if schedule.name == "ReduceLROnPlateau":
        unused.append("every")
    elif schedule.name[:1].isupper():
        unused.append("metric")
    yield from ignored(place, schedule, unused)


def freeze_problems(section: str, config: Config) -> Iterator[Problem]:
    """Yields an `unfreeze_at` that has nothing to unfreeze, or no epoch to do it in."""
    settings: FitConfig = getattr(config, section)
    if settings.unfreeze_at is None:
        return
    place = f"{section}.unfreeze_at"
    if not freeze_of(config, section):
        yield Problem(place, f"has nothing to unfreeze without {section}.freeze", hint=f"{section}.freeze: [PATTERN]")
    if settings.unfreeze_at >= settings.epochs:
        message = f"{settings.unfreeze_at} comes after the last of {settings.epochs} epochs, which are counted from 0"
        yield Problem(place, message, hint=f"--{place} {max(1, settings.epochs - 1)}, or null for never")


def freeze_of(config: Config, section: str) -> list[Match]:
    """Returns what a stage freezes; for qat by default what train keeps frozen to its end."""
    settings: FitConfig = getattr(config, section)
    if settings.freeze is not None or section == "train":
        return settings.freeze or []
    if "train" not in config.stages or config.train.unfreeze_at is not None:
        return []
    return config.train.freeze or []


def recomputed(settings: FitConfig) -> list[Match]:
    """Returns the patterns of `activation_checkpointing`."""
    given = settings.activation_checkpointing
    return given if isinstance(given, list) else [given]


def recomputation_problems(section: str, config: Config) -> Iterator[Problem]:
    """Yields what modules cannot be computed anew with."""
    if not recomputed(getattr(config, section)) or section not in config.stages:
        return
    place = f"{section}.activation_checkpointing"
    hint = f"--{place} '[]'"
    if config.strategy == "dp":
        yield Problem(place, "cannot follow strategy dp, which copies the model to each GPU", hint="--strategy ddp")
    if section == "train" and config.sync_batchnorm:
        message = "would repeat the collectives of sync_batchnorm in backward"
        yield Problem(place, message, hint=f"--sync_batchnorm false, or {hint}")
    if config.compile is True:
        message = "cannot follow compile: true: compiled, a model that computes modules anew learns otherwise"
        yield Problem(place, message, hint=f"--compile false, or {hint}")
    if section == "qat" and config.qat.backend == "fx":
        message = "cannot be followed by the backend 'fx', whose graph calls layers by their parts"
        yield Problem(place, message, hint=f"{hint}, or --qat.backend pt2e; or a smaller --data.micro_batch_size")
