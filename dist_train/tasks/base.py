"""Task: the base class for loss, score and metrics of a kind of problem."""

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

    A registered task is called with (num_outputs, args): `Splits.num_outputs` and the config's `task.args`. It is also
    called once without data, with any number, to check the arguments.
    """

    headline: str
    """The metric that chooses the best checkpoint, unless `select_by` names another."""

    lower_is_better: frozenset[str] = frozenset({"loss"})
    """Metrics whose smallest value is the best."""

    score_name: str = "acc"
    """The score's name on the progress line."""

    @abstractmethod
    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each sample, float [B]. The loop averages it over the real samples of the global batch."""

    @abstractmethod
    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Score of each sample for the progress line, float [B]; for classification 1 where the answer is right."""

    @abstractmethod
    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        """The model's answers, [B, ...], on which the int8 and the fake-quantized model must agree.

        Return numbers as floats: `agree` gets them in units of their spread.
        """

    def agree(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Agreement of two models' decisions about the same samples: float [B], 1 where they are the same.

        Float decisions come in units of their own spread: each output is divided by its standard deviation over the
        samples of all ranks.
        """
        return (left == right).float().flatten(1).mean(1) if left.dim() > 1 else (left == right).float()

    def check_outputs(self, outputs: torch.Tensor) -> None:
        """Raises DataError where a model's outputs for two inputs cannot be right for this task."""
        return

    def check_targets(self, targets: torch.Tensor) -> None:
        """Raises DataError where targets [N, ...] do not suit this task.

        It gets all targets of a split of image arrays, else those of one batch after the other. They are float32,
        int64, or (masks) uint8 and bool, whatever numbers the dataset returns. It may run in worker processes.
        """
        return

    @abstractmethod
    def metrics(self) -> torchmetrics.MetricCollection:
        """Makes the metrics of an evaluation; they take (outputs, targets) and sum over ranks."""

    def details(self) -> torchmetrics.MetricCollection:
        """Makes the metrics of a report that are not single numbers, such as a confusion matrix."""
        return torchmetrics.MetricCollection({})


def task_args(task: str, settings: type[S], args: Mapping[str, Any]) -> S:
    """Parses `task.args`.

    Raises:
        ConfigError: lists each mistake.
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


def wrong_targets(task: str, wanted: str, targets: torch.Tensor, hint: str | None = None) -> DataError:
    """Makes the error for targets of another kind; `hint` takes the place of the advice to choose another task."""
    shape = ", ".join(["N", *map(str, targets.shape[1:])])
    found = f"{str(targets.dtype).removeprefix('torch.')} [{shape}]"
    return DataError(
        f"{task} takes targets {wanted}, but the data's are {found}",
        hint
        or "--task.name with the data's own task (classification, multilabel, regression, segmentation), or other data",
    )


def require_classes(targets: torch.Tensor, num_classes: int, ignored: int | None = None) -> None:
    """Raises DataError where class indices other than `ignored` lie outside range(num_classes)."""
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
