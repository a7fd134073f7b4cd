"""Single-label classification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics
from pydantic import Field
from torchmetrics.classification import MulticlassAccuracy

from dist_train.config.base import Settings
from dist_train.errors import DataError
from dist_train.tasks.base import Task, require_classes, task_args, wrong_targets
from dist_train.tasks.counts import ClassAccuracy, TopK, confusion


class _Args(Settings):
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class Classification(Task):
    """Single-label classification: outputs float [B, classes], targets [B] of any integer type."""

    headline = "top1"

    def __init__(self, num_classes: int, args: dict[str, Any]) -> None:
        self._num_classes = num_classes
        self._label_smoothing = task_args("classification", _Args, args).label_smoothing

    def check_outputs(self, outputs: torch.Tensor) -> None:
        if outputs.shape != (2, self._num_classes):
            raise DataError(
                f"the model's outputs for 2 images have shape {list(outputs.shape)}, "
                f"but the data has {self._num_classes} classes",
                "give the model a head of num_classes outputs; model.args must not set another number",
            )

    def check_targets(self, targets: torch.Tensor) -> None:
        if targets.is_floating_point() or targets.dim() != 1:
            hint = "return int(target) from the dataset, an index of a class" if targets[0].numel() == 1 else None
            raise wrong_targets("classification", "int64 [N]", targets, hint)
        require_classes(targets, self._num_classes)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets.long(), reduction="none", label_smoothing=self._label_smoothing)

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.argmax(1) == targets).float()

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(1)

    def metrics(self) -> torchmetrics.MetricCollection:
        chosen: dict[str, torchmetrics.Metric | torchmetrics.MetricCollection] = {
            "top1": MulticlassAccuracy(self._num_classes, average="micro")
        }
        if self._num_classes > 5:
            chosen["top5"] = TopK(self._num_classes, 5)
        return torchmetrics.MetricCollection(chosen, compute_groups=False)

    def details(self) -> torchmetrics.MetricCollection:
        """Makes `confusion`, int64 [classes, classes], rows are true classes, and `per_class`, accuracies [classes].

        Above `DENSE_CLASSES` classes, the results of `ConfusedPairs` stand in place of `confusion`.
        """
        return torchmetrics.MetricCollection(
            {**confusion(self._num_classes), "per_class": ClassAccuracy(self._num_classes)}, compute_groups=False
        )
