"""What a batch means: loss, scores and metrics. Nothing below a task knows about classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torchmetrics
from pydantic import ValidationError

from dist_train.config.base import Settings
from dist_train.errors import ConfigError, DataError, Problem

S = TypeVar("S", bound=Settings)


class Task(ABC):
    """Loss and metrics of a kind of problem.

    A registered task is called with (num_outputs, args): `Splits.num_outputs`, and `task.args` of the config. It is called
    once without data too, with any number, to check the arguments.
    """

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
        """What the progress line shows beside the loss as `score_name`, for each sample, float [B]; for classification 1 where right."""

    @abstractmethod
    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        """The model's answer, [B, ...]: what the int8 and the fake-quantized model must agree on.

        Numbers are given as floats: `agree` gets them in units of their spread.
        """

    def agree(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """How far two models' decisions about the same samples agree: float [B], 1 where they are the same.

        Decisions that are floats come in units of their own spread: each output is divided by its standard deviation over
        the samples of all ranks.
        """
        return (left == right).float().flatten(1).mean(1) if left.dim() > 1 else (left == right).float()

    def check_outputs(self, outputs: torch.Tensor) -> None:
        """Raises DataError where a model's outputs for two inputs cannot be right for this task."""
        return

    def check_targets(self, targets: torch.Tensor) -> None:
        """Raises DataError where targets, [N, ...], cannot be this task's: all of a split of image arrays, else some rows."""
        return

    @abstractmethod
    def metrics(self) -> torchmetrics.MetricCollection:
        """Fresh metrics of an evaluation; they take (outputs, targets) and sum over ranks."""

    def details(self) -> torchmetrics.MetricCollection:
        """Metrics that are no single number, such as a confusion matrix; what reports show beside the scalars."""
        return torchmetrics.MetricCollection({})


def task_args(task: str, settings: type[S], args: Mapping[str, Any]) -> S:
    """`task.args`, checked.

    Raises:
        ConfigError: with each mistake.
    """
    try:
        return settings(**args)
    except ValidationError as error:
        hint = f"{task} takes {', '.join(settings.model_fields)}"
        raise ConfigError(
            [
                Problem(".".join(["task", "args", *map(str, mistake["loc"])]), mistake["msg"], hint=hint)
                for mistake in error.errors()
            ]
        ) from None


def wrong_targets(task: str, wanted: str, targets: torch.Tensor) -> DataError:
    """The error for targets of another kind."""
    shape = ", ".join(["N", *map(str, targets.shape[1:])])
    found = f"{str(targets.dtype).removeprefix('torch.')} [{shape}]"
    return DataError(
        f"{task} takes targets {wanted}, but the data's are {found}",
        "--task.name with the data's own task (classification, multilabel, regression, segmentation), or other data",
    )


def require_classes(targets: torch.Tensor, num_classes: int, ignored: int | None = None) -> None:
    """Raises DataError where class indices do not lie in range(num_classes), apart from `ignored`."""
    real = targets if ignored is None else targets[targets != ignored]
    if not real.numel():
        return
    low, high = int(real.min()), int(real.max())
    if low < 0 or high >= num_classes:
        besides = "" if ignored is None else f", or be task.args.ignore_index ({ignored})"
        raise DataError(
            f"targets must lie in range({num_classes}){besides}, got {low}..{high}",
            "num_classes of the dataset is the number of its classes",
        )
