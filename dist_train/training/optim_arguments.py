"""Checks `optim.args` and `schedule.args` by the signatures of what they are for, before ranks connect."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from dist_train import registry
from dist_train.config.fit import FitConfig, GroupConfig, OptimConfig
from dist_train.config.tree import Config
from dist_train.errors import ConfigError, Problem, SetupError, did_you_mean
from dist_train.training.optim import REFUSALS, build_optimizer, decays
from dist_train.training.schedule import Lead, is_rate, make_named

_MANY = 10**6  # steps, where they are not known yet
_TRIED = 12  # steps of a schedule
# Arguments that are given elsewhere, or that the loop does not allow.
_ELSEWHERE = {
    "params": "optim.groups",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "fused": "optim.name: sgd, adam or adamw, which are fused",
    "capturable": "nothing: steps are not captured in CUDA graphs",
    "differentiable": "nothing: no step is differentiated",
}
_OF_SCHEDULE = {"optimizer": "optim", "last_epoch": "nothing: a resumed run goes on by itself"}


def check_optim_and_schedule(config: Config) -> None:
    """Checks them for all stages that train.

    Raises:
        ConfigError: lists all mistakes.
    """
    problems = list[Problem]()
    for stage in dict.fromkeys(config.stages):
        settings = getattr(config, stage, None)
        if isinstance(settings, FitConfig):
            problems += _problems(stage, settings)
    if problems:
        raise ConfigError(problems)


def _problems(stage: str, settings: FitConfig) -> Iterator[Problem]:
    optim, place = settings.optim, f"{stage}.optim"
    make = registry.optimizers.get(optim.name)
    if not optim.own:
        unknown = list(_unknown(f"{place}.args", optim.name, make, optim.args, _ELSEWHERE))
        yield from unknown
        if unknown:
            return
        if optim.weight_decay and not decays(make):
            yield Problem(f"{place}.weight_decay", f"is ignored by {optim.name}", hint=f"--{place}.weight_decay 0")
    try:
        made = _on_a_matrix(optim)
    except SetupError as error:
        if inspect.isclass(make):  # a function of the user's may need its model
            yield Problem(f"{place}.args", error.message, hint=_taken(make, _ELSEWHERE))
        return
    for number, group in enumerate(optim.groups):
        yield from _of_arguments(f"{place}.groups.{number}", made, optim, group)
    yield from _of_schedule(stage, settings, made)


def _on_a_matrix(optim: OptimConfig) -> torch.optim.Optimizer:
    # One that all take: Muon has no other.
    return build_optimizer(nn.Linear(2, 2, bias=False), optim.model_copy(update={"groups": []}))


def _of_arguments(place: str, made: torch.optim.Optimizer, optim: OptimConfig, group: GroupConfig) -> Iterator[Problem]:
    """Checks a group's optimizer and arguments."""
    if group.name is not None and group.name != optim.name:
        optim = optim.model_copy(update={"name": group.name, "args": {}})
        try:
            made = _on_a_matrix(optim)
        except SetupError as error:
            if inspect.isclass(registry.optimizers.get(group.name)):
                yield Problem(f"{place}.name", error.message, hint=f"another optimizer, or {place}.lr")
            return
    known = [name for name in made.defaults if name not in _ELSEWHERE]
    for name in group.args:
        if name not in known:
            hint = _hint(name, known)
            yield Problem(f"{place}.args.{name}", f"{optim.name} has no setting {name!r} of a group", hint=hint)
    if group.args.keys() <= set(known):
        yield from _of_group(f"{place}.args", type(made), optim, group)


def _of_group(
    place: str, kind: type[torch.optim.Optimizer], optim: OptimConfig, group: GroupConfig
) -> Iterator[Problem]:
    """Tries a group's arguments as those of the optimizer: torch checks none of a group's before they are used."""
    if not kind.__module__.startswith("torch.optim"):
        return  # arguments of its own, which its function may set elsewhere
    make: Any = kind
    layer = nn.Linear(2, 2, bias=False)
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in group.args.items()}
    if optim.own and optim.name == "sgd":
        args = {"momentum": optim.momentum, "nesterov": optim.nesterov, **args}
    elif not optim.own:
        args = {name: tuple(value) if isinstance(value, list) else value for name, value in optim.args.items()} | args
    try:
        made: torch.optim.Optimizer = make(layer.parameters(), lr=optim.lr, **args)
        layer(torch.ones(1, 2)).sum().backward()
        for _ in range(2):  # the first makes the state
            made.step()
    except REFUSALS as error:
        yield Problem(place, f"{optim.name} does not take them: {error}", hint="correct them, or leave them out")


def _of_schedule(stage: str, settings: FitConfig, optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    schedule, place = settings.schedule, f"{stage}.schedule.args"
    if schedule.own:
        return
    make = registry.schedules.get(schedule.name)
    unknown = list(_unknown(place, schedule.name, make, schedule.args, _OF_SCHEDULE))
    yield from unknown
    if unknown:
        return
    # A given length is compared with the stage's when that is known.
    total = 1 if {"total_steps", "epochs"} & schedule.args.keys() else _MANY
    try:
        lead = Lead(settings.optim.lr, optimizer.defaults)
        made = make_named(lead, schedule, total, True)
        if inspect.isclass(make):
            _try_out(lead, made, schedule.name)
    except SetupError as error:
        if inspect.isclass(make):
            hint = _taken(make, _OF_SCHEDULE)
            if "cycle_momentum" in error.message:
                hint = f"{place}: {{cycle_momentum: false}}, or an optimizer with momentum or betas"
            yield Problem(place, error.message, hint=hint)


def _try_out(lead: Lead, schedule: Any, name: str) -> None:
    """Steps a schedule of torch's, which looks at some of its arguments only then.

    Raises:
        SetupError: it fails, or gives a rate that is none.
    """
    lead.step()
    try:
        for _ in range(0 if isinstance(schedule, OneCycleLR) else _TRIED):
            schedule.step(*((1.0,) if isinstance(schedule, ReduceLROnPlateau) else ()))
            rate = lead.param_groups[0]["lr"]
            if not is_rate(rate, lead.defaults["lr"]):
                raise ValueError(f"it gives the learning rate {rate:g}")
    except REFUSALS as error:
        message = f"the schedule {name} cannot be made: {error}"
        raise SetupError(message, "change schedule.args, or take another schedule.name") from error


def _unknown(
    place: str, what: str, make: Callable[..., Any], args: Mapping[str, Any], elsewhere: Mapping[str, str]
) -> Iterator[Problem]:
    parameters = inspect.signature(make).parameters
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    known = [name for name in parameters if name not in elsewhere]
    for name in args:
        if name in elsewhere:
            yield Problem(f"{place}.{name}", "is not given here", hint=f"take {elsewhere[name]}")
        elif name not in known and not open_ended:
            yield Problem(f"{place}.{name}", f"{what} takes no {name!r}", hint=_hint(name, known))


def _hint(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, known) or f"it takes {', '.join(known)}"


def _taken(make: Callable[..., Any], elsewhere: Collection[str]) -> str:
    return f"it takes {', '.join(name for name in inspect.signature(make).parameters if name not in elsewhere)}"
