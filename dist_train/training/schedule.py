"""Learning-rate schedules: torch's by name, registered ones, and a warm-up before any of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from dist_train import registry
from dist_train.config.fit import ScheduleConfig, steps_in
from dist_train.errors import SetupError
from dist_train.training.optim import REFUSALS

_WARMUP_START = 0.01
_CYCLED = ("momentum", "betas")
_WHOLE = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps", "PolynomialLR": "total_iters"}


class Lead(torch.optim.Optimizer):
    """One group that a schedule is computed for: the section's rate. It trains nothing."""

    def __init__(self, lr: float, defaults: Mapping[str, Any]) -> None:
        """defaults: of the optimizer that follows; a schedule may change its momentum."""
        super().__init__([torch.zeros(1)], {"lr": lr, **{name: defaults[name] for name in _CYCLED if name in defaults}})

    def step(self, closure: Any = None) -> Any:
        return None


def is_rate(rate: float, base: float) -> bool:
    """Tells whether a schedule's rate is one: finite and not negative, but for the rounding of one that ends at 0."""
    return -1e-6 * base <= rate < math.inf


class Schedule:
    """Moves the rates of an optimizer's groups, each in its ratio to the section's rate.

    A group has the ratio that it was built with; a ratio of 1 changes no bit. A schedule that changes momentum, such as
    OneCycleLR, changes it for all groups but those with their own.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lead: Lead,
        after: LRScheduler,
        warmup_steps: int = 0,
        by_epoch: bool = False,
        metric: str = "",
    ) -> None:
        """
        Args:
            lead: the optimizer of `after`.
            warmup_steps: steps before `after` begins.
            by_epoch: step `after` at the ends of epochs.
            metric: of the evaluation, for ReduceLROnPlateau.
        """
        self._optimizer, self._lead, self._after = optimizer, lead, after
        self._warmup_steps, self._by_epoch, self._metric = warmup_steps, by_epoch, metric
        self._done = 0
        base = _base(optimizer)
        self._ratios = [group["lr"] / base for group in optimizer.param_groups]
        self._cycled = {
            name: [i for i, each in enumerate(optimizer.param_groups) if each.get(name) == optimizer.defaults[name]]
            for name in _CYCLED
            if name in lead.param_groups[0]
        }
        lead.step()  # torch warns of a schedule that steps first
        self._put()

    @property
    def _on_plateau(self) -> bool:
        return isinstance(self._after, ReduceLROnPlateau)

    def step(self) -> None:
        """Goes on after an optimizer step."""
        self._done += 1
        if self._done > self._warmup_steps and not self._by_epoch and not self._on_plateau:
            self._after.step()
        self._put()

    def end_epoch(self, metrics: Mapping[str, float] | None) -> None:
        """Goes on at the end of an epoch. metrics: of the evaluation that followed it, equal on all ranks."""
        if self._done <= self._warmup_steps:
            return
        if isinstance(self._after, ReduceLROnPlateau):
            if metrics is not None:
                self._after.step(float(metrics[self._metric]))
        elif self._by_epoch:
            self._after.step()
        self._put()

    def go_on(self, steps: int, updates: int, steps_per_epoch: int, recorded: Mapping[str, Any]) -> None:
        """Goes on from another run of the loop, as if this schedule had been there from its beginning.

        ReduceLROnPlateau, which follows evaluations, takes its state if the other schedule was one, too.

        Args:
            steps: of the other run, up to the end of an epoch's evaluation where one ended.
            updates: those of them that changed the parameters.
            recorded: state of the other schedule.
        """
        if self._on_plateau and "num_bad_epochs" in recorded.get("after", ()):
            self.load_state_dict(recorded)
            self._put()
            return
        for step in range(steps):
            if step < updates:
                self.step()
            if (step + 1) % steps_per_epoch == 0:
                self.end_epoch(None)

    def _put(self) -> None:
        lead = self._lead.param_groups[0]
        rate = lead["lr"]
        if not is_rate(rate, self._lead.defaults["lr"]):
            raise SetupError(
                f"the schedule {type(self._after).__name__} gives the learning rate {rate:g} after {self._done} steps",
                "change schedule.args, or take another schedule.name: a rate is a finite number, at least 0",
            )
        if self._done < self._warmup_steps:
            rate *= _WARMUP_START + (1 - _WARMUP_START) * self._done / self._warmup_steps
        groups = self._optimizer.param_groups
        for group, ratio in zip(groups, self._ratios, strict=True):
            group["lr"] = rate * ratio
        for name, followers in self._cycled.items():
            for index in followers:
                groups[index][name] = lead[name]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, of numbers, lists and dicts."""
        lead = {name: value for name, value in self._lead.param_groups[0].items() if name != "params"}
        return {"done": self._done, "lead": lead, "after": self._after.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a state. The optimizer's groups have their rates from the optimizer's own state."""
        if "lead" not in state:  # of an older checkpoint, whose schedules knew all groups, which had one rate
            state = {"done": 0, "lead": {"lr": self._optimizer.param_groups[0]["lr"]}, "after": _of_one_group(state)}
        self._done = state["done"]
        self._lead.param_groups[0].update(state["lead"])
        self._after.load_state_dict(dict(state["after"]))


def _base(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"]))


def _of_one_group(state: Any) -> Any:
    if isinstance(state, list):
        return [_of_one_group(each) for each in state]
    if not isinstance(state, Mapping):
        return state
    return {
        name: value[:1] if name in ("base_lrs", "_last_lr") else _of_one_group(value) for name, value in state.items()
    }


def build_schedule(
    optimizer: torch.optim.Optimizer,
    config: ScheduleConfig,
    total_steps: int,
    steps_per_epoch: int,
    metric: str = "",
    lower_is_better: bool = True,
) -> Schedule:
    """Builds a schedule over `total_steps` optimizer steps: linear warm-up, then what `config.name` names.

    Args:
        metric: that ReduceLROnPlateau watches.
        lower_is_better: for that metric.

    Raises:
        SetupError: torch or the registered function refuses the arguments.
    """
    warmup_steps = steps_in(config.warmup, total_steps)
    lead = Lead(_base(optimizer), optimizer.defaults)
    rest = max(1, total_steps - warmup_steps)
    if config.own:
        return Schedule(optimizer, lead, _own(lead, config, warmup_steps, rest, steps_per_epoch))
    if config.every == "epoch":
        rest = -(-rest // steps_per_epoch)
    after = make_named(lead, config, rest, lower_is_better)
    return Schedule(optimizer, lead, after, warmup_steps, config.every == "epoch", metric)


def _own(lead: Lead, config: ScheduleConfig, warmup_steps: int, rest: int, steps_per_epoch: int) -> LRScheduler:
    after: LRScheduler
    if config.name == "constant":
        after = ConstantLR(lead, factor=1.0, total_iters=0)
    elif config.name == "step":
        after = StepLR(lead, max(1, round(config.step_epochs * steps_per_epoch)), config.gamma)
    elif config.name == "cosine":
        after = CosineAnnealingLR(lead, rest, eta_min=config.final * lead.defaults["lr"])
    else:
        after = LinearLR(lead, start_factor=1.0, end_factor=config.final, total_iters=rest)
    if warmup_steps == 0:
        return after
    rise = LinearLR(lead, start_factor=_WARMUP_START, end_factor=1.0, total_iters=warmup_steps)
    return SequentialLR(lead, [rise, after], milestones=[warmup_steps])


def make_named(lead: Lead, config: ScheduleConfig, total: int, lower_is_better: bool) -> LRScheduler:
    """Makes a schedule of torch's or a registered one, of `total` steps (or epochs) after the warm-up.

    Raises:
        SetupError: it refuses the arguments, or it is no schedule.
    """
    make = registry.schedules.get(config.name)
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in config.args.items()}
    if config.name == "MultiStepLR" and isinstance(args.get("milestones"), tuple):
        args["milestones"] = list(args["milestones"])
    if config.name in _WHOLE and not {"total_steps", "epochs"} & args.keys():
        args.setdefault(_WHOLE[config.name], total)
    if config.name == "OneCycleLR":
        args.setdefault("max_lr", lead.defaults["lr"])
    if config.name == "ReduceLROnPlateau":
        args.setdefault("mode", "min" if lower_is_better else "max")
    if not inspect.isclass(make) and "total_steps" in inspect.signature(make).parameters:
        args.setdefault("total_steps", total)
    try:
        made: object = make(lead, **args)
    except REFUSALS as error:
        raise SetupError(
            f"the schedule {config.name} cannot be made: {error}", "change schedule.args, or take another schedule.name"
        ) from error
    if isinstance(made, OneCycleLR) and made.total_steps < total:
        raise SetupError(
            f"OneCycleLR has {made.total_steps} steps, and the stage has {total} after the warm-up",
            "leave total_steps, epochs and steps_per_epoch out of schedule.args: they are all steps then",
        )
    if not isinstance(made, LRScheduler):
        raise SetupError(
            f"the registered schedule {config.name} returned a {type(made).__name__}",
            "return a torch.optim.lr_scheduler.LRScheduler: register a function of (optimizer, total_steps, **args)",
        )
    return made
