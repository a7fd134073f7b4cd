"""A model in training, and what its stage does with it at the fixed points of the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from dist_train.training.evaluate import Evaluation
from dist_train.training.hooks import Hook
from dist_train.training.reduction import StepReduction


class Learner(ABC):
    """What the loop asks of a stage.

    Attributes:
        model: the module that is trained, not wrapped by a strategy.
        reduction: makes loss, BatchNorm statistics and ranges of a step those of all ranks' data.
    """

    def __init__(self, model: nn.Module, reduction: StepReduction) -> None:
        self.model = model
        self.reduction = reduction

    @abstractmethod
    def hooks(self, total_steps: int) -> Sequence[Hook]:
        """Returns the hooks of a stage of `total_steps` steps."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Evaluates `model` itself or its moving average. Collective."""

    @abstractmethod
    def recalibrate(self, averaged: nn.Module) -> None:
        """Estimates the statistics of the moving average anew, before it is evaluated. Collective."""
