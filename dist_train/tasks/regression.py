"""Regression: one or several numbers per sample, or per pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchmetrics
from pydantic import Field
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.wrappers import LambdaInputTransformer

from dist_train.config.base import Settings
from dist_train.errors import DataError
from dist_train.tasks.base import Task, one_output, require_tensor, task_args, wrong_targets
from dist_train.trees import Tree

_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


class _Args(Settings):
    loss: Literal["mse", "l1", "huber"] = "mse"
    """huber: squared within 1, linear beyond."""
    tolerance: float = Field(0.1, gt=0)
    """Two models agree on a number that differs by at most this many standard deviations of the outputs."""


class Regression(Task):
    """Regression: outputs float [B, K]; targets of any number type [B, K], or [B] where K is 1.

    Image to image: both are [B, K, H, W], where each pixel counts as a sample of K numbers does in the metrics.
    A sample's loss is the mean over its numbers. Metrics: `mae`, `rmse`, `r2` (the mean over the K outputs).
    Targets on a scale near 1 train best; scale them in the dataset.
    """

    headline = "rmse"
    lower_is_better = frozenset({"loss", "mae", "rmse"})
    score_name = "mae"

    def __init__(self, num_outputs: int, args: dict[str, Any]) -> None:
        settings = task_args("regression", _Args, args)
        self._num_outputs = num_outputs
        self._loss = _LOSSES[settings.loss]
        self._tolerance = settings.tolerance

    def pick(self, outputs: Tree) -> torch.Tensor:
        return one_output(outputs, "regression")

    def check_outputs(self, outputs: torch.Tensor) -> None:
        if outputs.dim() not in (2, 4) or outputs.shape[:2] != (2, self._num_outputs):
            raise DataError(
                f"the model's outputs for 2 samples have shape {list(outputs.shape)}, "
                f"but the data has {self._num_outputs} numbers a sample",
                "give the model a head of num_classes outputs ([B, 1] for one number, [B, K, H, W] for an image); "
                "model.args must not set another number",
            )

    def check_targets(self, targets: Tree) -> None:
        require_tensor(targets, "regression")
        width = 1 if targets.dim() == 1 else targets.shape[1]
        if targets.dim() not in (1, 2, 4) or width != self._num_outputs:
            wanted = "float [N]" if self._num_outputs == 1 else f"float [N, {self._num_outputs}]"
            raise wrong_targets("regression", wanted, targets)
        if not bool(torch.isfinite(targets).all()):
            raise DataError("regression targets must be finite, and some are NaN or infinite", "leave such rows out")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._loss(outputs, _like(outputs, targets), reduction="none").flatten(1).mean(1)

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - _like(outputs, targets)).abs().flatten(1).mean(1)

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs

    def agree(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return ((left - right).abs() <= self._tolerance).float().flatten(1).mean(1)

    def metrics(self) -> torchmetrics.MetricCollection:
        # Sums of squares in float32 are too coarse for r2 where the mean is much larger than the spread.
        numbers = self._numbers
        chosen: dict[str, torchmetrics.Metric | torchmetrics.MetricCollection] = {
            "mae": LambdaInputTransformer(MeanAbsoluteError().set_dtype(torch.float64), numbers, numbers),
            "rmse": LambdaInputTransformer(MeanSquaredError(squared=False).set_dtype(torch.float64), numbers, numbers),
            "r2": LambdaInputTransformer(R2Score().set_dtype(torch.float64), numbers, numbers),
        }
        return torchmetrics.MetricCollection(chosen, compute_groups=False)

    def _numbers(self, values: torch.Tensor) -> torch.Tensor:
        values = values.double()
        if values.dim() == 4:
            values = values.movedim(1, -1).flatten(0, -2)
        return values.flatten() if self._num_outputs == 1 else values


def _like(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns targets in the outputs' shape and dtype: [B] with [B, 1] would broadcast to [B, B]."""
    targets = targets.unsqueeze(1) if targets.dim() == 1 else targets
    if targets.shape != outputs.shape:
        raise ValueError("their shapes differ")
    return targets.to(outputs.dtype)
