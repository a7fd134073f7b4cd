"""What a batch means: loss, scores and metrics. Nothing below a task knows about classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics
from pydantic import Field, ValidationError
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from dist_train.config_base import Settings
from dist_train.errors import ConfigError, DataError, Problem


class Task(ABC):
    """Loss and metrics of a kind of problem."""

    headline: str
    """Name of the metric that chooses the best checkpoint, unless `select_by` names another."""

    lower_is_better: frozenset[str] = frozenset({"loss"})
    """Names of the metrics of which the smallest value is the best."""

    score_name: str = "acc"
    """What the progress line calls the score."""

    @abstractmethod
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each sample, float [B]. The loop takes the mean over the real samples of the global batch."""

    @abstractmethod
    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What the progress line shows beside the loss, for each sample, float [B]; for classification 1 where right."""

    @abstractmethod
    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        """The model's answer, [B]: what the int8 and the fake-quantized model must agree on."""

    def agree(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """How far two models' decisions about the same samples agree: float [B], 1 where they are the same."""
        return (left == right).float().flatten(1).mean(1) if left.dim() > 1 else (left == right).float()

    def check_outputs(self, outputs: torch.Tensor) -> None:
        """Raises DataError where a model's outputs for two inputs cannot be right for this task."""
        return

    @abstractmethod
    def metrics(self) -> torchmetrics.MetricCollection:
        """Fresh metrics of an evaluation; they take (outputs, targets) and sum over ranks."""

    def details(self) -> torchmetrics.MetricCollection:
        """Metrics that are no single number, such as a confusion matrix; what reports show beside the scalars."""
        return torchmetrics.MetricCollection({})


class _ClassificationArgs(Settings):
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class Classification(Task):
    """Single-label classification: outputs float [B, classes], targets int64 [B]."""

    headline = "top1"

    def __init__(self, num_classes: int, args: dict[str, Any]) -> None:
        try:
            settings = _ClassificationArgs(**args)
        except ValidationError as error:
            raise ConfigError(
                [
                    Problem(
                        f"task.args.{'.'.join(map(str, each['loc']))}",
                        each["msg"],
                        hint="classification takes label_smoothing",
                    )
                    for each in error.errors()
                ]
            ) from None
        self._num_classes = num_classes
        self._label_smoothing = settings.label_smoothing

    def agree(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """How far two models' decisions about the same samples agree: float [B], 1 where they are the same."""
        return (left == right).float().flatten(1).mean(1) if left.dim() > 1 else (left == right).float()

    def check_outputs(self, outputs: torch.Tensor) -> None:
        if outputs.shape != (2, self._num_classes):
            raise DataError(
                f"the model's outputs for 2 images have shape {list(outputs.shape)}, but the data has {self._num_classes} classes",
                "give the model a head of num_classes outputs; model.args must not set another number",
            )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self._label_smoothing)

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.argmax(1) == targets).float()

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(1)

    def metrics(self) -> torchmetrics.MetricCollection:
        chosen: dict[str, torchmetrics.Metric | torchmetrics.MetricCollection] = {
            "top1": MulticlassAccuracy(self._num_classes, average="micro")
        }
        if self._num_classes > 5:
            chosen["top5"] = MulticlassAccuracy(self._num_classes, top_k=5, average="micro")
        return torchmetrics.MetricCollection(chosen, compute_groups=False)

    def details(self) -> torchmetrics.MetricCollection:
        return torchmetrics.MetricCollection(
            {
                "confusion": MulticlassConfusionMatrix(self._num_classes),
                "per_class": MulticlassAccuracy(self._num_classes, average="none"),
            },
            compute_groups=False,
        )
