"""What training changes: model, optimizer, schedule, moving average, step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.config_fit import FitConfig
from dist_train.optim import build_optimizer, build_schedule


class TrainState:
    """The state of one stage's loop. Its `state_dict` is all that a resumed loop needs, as every step seeds its own generators.

    Attributes:
        step: optimizer steps done in this stage.
        metrics: of the newest evaluation.
        left_out: samples of the epoch so far, of all ranks, that could not be decoded.
        best: highest `value` of the headline metric so far, and its `step`.
    """

    def __init__(self, model: nn.Module, config: FitConfig, total_steps: int, steps_per_epoch: int) -> None:
        self.model = model
        self.optimizer: torch.optim.Optimizer = build_optimizer(model, config.optim)
        self.schedule: LRScheduler = build_schedule(self.optimizer, config.schedule, total_steps, steps_per_epoch)
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.step = 0
        self.left_out = 0
        self.metrics: dict[str, float | int] = {}
        self.best: dict[str, Any] | None = None

    @property
    def chosen(self) -> nn.Module:
        """What is evaluated and handed on: the moving average where there is one."""
        return self.average.module if self.average is not None else self.model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "step": self.step,
            "left_out": self.left_out,
            "metrics": self.metrics,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step = state["step"]
        self.left_out = state["left_out"]
        self.metrics = state["metrics"]
        self.best = state["best"]
