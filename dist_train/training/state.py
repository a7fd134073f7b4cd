"""Holds the state that training changes: model, optimizer, schedule, moving average, step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_train.config.fit import FitConfig
from dist_train.errors import DataError, ModelError, SetupError
from dist_train.strategies.shards import in_shards, placed
from dist_train.training.average import MovingAverage
from dist_train.training.freezing import Freezing
from dist_train.training.optim import build_optimizer, complete_momenta
from dist_train.training.schedule import Schedule, build_schedule
from dist_train.training.selection import Selection


class TrainState:
    """The state of one stage's loop.

    `state_dict` is all that a resumed loop needs: every step seeds the random generators, so they need not be saved.

    Attributes:
        parameters: the trainable parameters.
        step: number of optimizer steps done in this stage.
        skipped: number of these steps that changed nothing because fp16 gradients overflowed.
        left_out: number of samples in this epoch so far, over all ranks, that could not be decoded.
        epoch_open: True if an epoch's steps are done but its evaluation is not.
        metrics: metrics of the newest evaluation; at the end, of the stage's result.
        selection: ranks the evaluations so far.
        chosen_step: number of steps after which the stage's result was taken.
        ended: the state after the last step, from which another run can go on, set by the loop at its end;
            None where no other run could.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FitConfig,
        total_steps: int,
        steps_per_epoch: int,
        selection: Selection,
        scaler: torch.amp.GradScaler,
        groups: Sequence[Collection[str]] = (),
        names: Mapping[str, str] | None = None,
        freezing: Freezing | None = None,
        copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    ) -> None:
        """
        Args:
            groups, names: as of `build_optimizer`.
            copied: makes the moving average's model, as `Strategy.copy` does. Collective.
        """
        self.model = model
        self._shapes = {name: each.shape for name, each in model.state_dict().items() if isinstance(each, torch.Tensor)}
        self.selection = selection
        self._scaler = scaler
        self._steps_per_epoch = steps_per_epoch
        self.skipped = 0
        self.optimizer: torch.optim.Optimizer = build_optimizer(
            model, config.optim, not scaler.is_enabled(), groups, names
        )
        self.parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        metric = config.schedule.metric or selection.metric
        self.schedule: Schedule = build_schedule(
            self.optimizer, config.schedule, total_steps, steps_per_epoch, metric, selection.lower_is_better(metric)
        )
        complete_momenta(self.optimizer)
        self.average: MovingAverage | None = None
        if config.ema_decay is not None:
            self.average = MovingAverage(copied(model), config.ema_decay)
            if freezing is not None:
                freezing.follow(self.average.module)
        self.step = 0
        self.left_out = 0
        self.epoch_open = False
        self.metrics: dict[str, float | int] = {}
        self.chosen_step = 0
        self.ended: dict[str, Any] | None = None

    @property
    def chosen(self) -> nn.Module:
        """The model to evaluate and hand on: the moving average if there is one, else the trained model."""
        return self.average.module if self.average is not None else self.model

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds; what is in shards stays so, each rank's own.

        Raises:
            ModelError: a buffer has another shape than at the start, so that nobody could load it.
        """
        model = self.model.state_dict()
        for name, tensor in model.items():
            if isinstance(tensor, torch.Tensor) and tensor.shape != self._shapes.get(name, tensor.shape):
                raise ModelError(
                    f"{name} of the model has grown in training, from {list(self._shapes[name])} to "
                    f"{list(tensor.shape)}: no new start could load it",
                    "register it at its full size; or make it a plain attribute, if it is a cache",
                )
        return {
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self._scaler.state_dict(),
            "skipped": self.skipped,
            "step": self.step,
            "left_out": self.left_out,
            "epoch_open": self.epoch_open,
            "metrics": self.metrics,
            "evaluations": self.selection.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.take_model(state)
        self._load_optimizer(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.selection.restore(state["evaluations"])
        self._scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
        self.left_out = state["left_out"]
        self.epoch_open = state.get("epoch_open", False)  # absent from older checkpoints
        self.step = state["step"]

    def take_model(self, state: dict[str, Any]) -> None:
        """Loads model, average and metrics of another step; `step` and the counters stay as they are."""
        _load(self.model, state["model"])
        if self.average is not None:
            _load(self.average, state["average"])
        self.metrics = state["metrics"]
        self.chosen_step = state["step"]

    def require_states_alike(self) -> None:
        """Checks, after a step, that a checkpoint of the optimizer's states can be cut into shards again.

        Raises:
            SetupError: a state of a parameter in shards has another shape.
        """
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items() if in_shards(parameter) else ():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                    raise SetupError(
                        f"{type(self.optimizer).__name__} keeps {name} of {list(value.shape)} for a parameter of "
                        f"{list(parameter.shape)}: strategy fsdp cannot cut it into shards",
                        "take an optimizer that computes by element, such as adamw; or --strategy ddp",
                    )

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Loads the optimizer's state. Of tensors that are whole each rank takes its shards."""
        # Beside those of parameters, by their numbers, an optimizer of others may keep states of its own.
        tensors = {
            key: {name: placed(value, self.parameters[key]) for name, value in each.items()}
            if isinstance(key, int) and isinstance(each, Mapping)
            else each
            for key, each in state["state"].items()
        }
        # Whether a kernel updates all in one pass is this run's own: tensors in shards may have none.
        groups = [
            {**given, **{name: own[name] for name in ("fused",) if name in own}}
            for given, own in zip(state["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({**state, "state": tensors, "param_groups": groups})

    def end(self, *, replaced: bool) -> None:
        """Sets `ended`.

        replaced: True if the model is going to be that of another step, so that a copy is made.
        """
        try:
            self.ended = self.state_dict()
        except ModelError:  # this run needs no further checkpoint within the stage
            return
        # The chosen model is loaded into the trained one, for the stages after.
        if replaced or self.average is not None:
            self.ended["model"] = copy.deepcopy(self.ended["model"])
        if replaced:
            self.ended["average"] = copy.deepcopy(self.ended["average"])

    def extend(self, state: dict[str, Any]) -> None:
        """Goes on from another run's state, by the settings of this one.

        Model, moving average, the optimizer's tensors and the counters are those of `state`. Hyperparameters are this
        run's, and the schedule is this run's after as many steps. The evaluations so far do not count: their models are
        not in this run's checkpoints.

        Raises:
            DataError: the optimizer has other parameters, or only one of the runs has a moving average.
        """
        own, given = self.optimizer.state_dict(), state["optimizer"]
        sizes = [[len(group["params"]) for group in each["param_groups"]] for each in (own, given)]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"train.extend_from: the optimizer has parameter groups of {sizes[0]} tensors, and had {sizes[1]}",
                "train the same parameters in the same groups as that run",
            )
        if (self.average is None) != (state["average"] is None):
            raise DataError(
                f"train.extend_from: the other run has {'no' if state['average'] is None else 'a'} moving average",
                "set train.ema_decay as in that run",
            )
        self.take_model(state)
        # An epoch that is not evaluated yet has not ended for the schedule either.
        steps, updates = state["step"] - state["epoch_open"], state["step"] - state["skipped"]
        self.schedule.go_on(steps, min(updates, steps), self._steps_per_epoch, state["schedule"])
        if updates > steps:
            self.schedule.step()
        own = self.optimizer.state_dict()  # with the learning rates of that step
        tensors = {key: {**own["state"].get(key, {}), **each} for key, each in given["state"].items()}
        self._load_optimizer({**own, "state": {**own["state"], **tensors}})
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self.skipped, self.left_out, self.step = state["skipped"], state["left_out"], state["step"]
        self.epoch_open = state["epoch_open"]


def _load(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads a module's state. Of tensors that are whole each rank takes its shards."""
    own = module.state_dict()
    module.load_state_dict({name: placed(value, own.get(name)) for name, value in state.items()})
