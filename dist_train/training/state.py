"""Holds the state that training changes: model, optimizer, schedule, moving average, step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.config.stages import FitConfig
from dist_train.training.optim import build_optimizer, build_schedule
from dist_train.training.selection import Selection


class TrainState:
    """The state of one stage's loop.

    `state_dict` is all that a resumed loop needs: every step seeds the random generators, so they need not be saved.

    Attributes:
        step: number of optimizer steps done in this stage.
        skipped: number of these steps that changed nothing because fp16 gradients overflowed.
        left_out: number of samples in this epoch so far, over all ranks, that could not be decoded.
        epoch_open: True if an epoch's steps are done but its evaluation is not.
        metrics: metrics of the newest evaluation; at the end, of the stage's result.
        selection: ranks the evaluations so far.
        chosen_step: number of steps after which the stage's result was taken.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FitConfig,
        total_steps: int,
        steps_per_epoch: int,
        selection: Selection,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.model = model
        self.selection = selection
        self._scaler = scaler
        self.skipped = 0
        self.optimizer: torch.optim.Optimizer = build_optimizer(model, config.optim)
        self.schedule: LRScheduler = build_schedule(self.optimizer, config.schedule, total_steps, steps_per_epoch)
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.step = 0
        self.left_out = 0
        self.epoch_open = False
        self.metrics: dict[str, float | int] = {}
        self.chosen_step = 0

    @property
    def chosen(self) -> nn.Module:
        """The model to evaluate and hand on: the moving average if there is one, else the trained model."""
        return self.average.module if self.average is not None else self.model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
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
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.selection.restore(state["evaluations"])
        self._scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
        self.left_out = state["left_out"]
        self.epoch_open = state.get("epoch_open", False)  # absent from older checkpoints
        self.step = state["step"]

    def take_model(self, state: dict[str, Any]) -> None:
        """Loads model, average and metrics of another step; `step` and the counters stay as they are."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.metrics = state["metrics"]
        self.chosen_step = state["step"]
