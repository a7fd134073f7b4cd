"""A task."""

import math
from typing import Any

import torch
import torchmetrics

import dist_train


@dist_train.register_task("log_cosh")
class LogCosh(dist_train.Task):
    """Regression of one number: outputs float [B, 1], targets float [B], loss log(cosh(difference))."""

    headline = "error"
    lower_is_better = frozenset({"loss", "error"})
    score_name = "error"

    def __init__(self, num_outputs: int, args: dict[str, Any]) -> None:
        self._tolerance = args.get("tolerance", 0.2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        difference = outputs[:, 0] - targets
        return difference + torch.nn.functional.softplus(-2 * difference) - math.log(2)

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - targets).abs()

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs[:, 0]

    def agree(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return ((left - right).abs() < self._tolerance).float()

    def metrics(self) -> torchmetrics.MetricCollection:
        error = torchmetrics.wrappers.LambdaInputTransformer(torchmetrics.MeanAbsoluteError(), self.decide)
        return torchmetrics.MetricCollection({"error": error})
