"""Defines the interface between the loop and a stage: hooks, evaluation, recalibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from dist_train.training.evaluate import Evaluation
from dist_train.training.hooks import Hook
from dist_train.training.reduction import StepReduction


class Learner(ABC):
    """The stage's part of the loop.

    Attributes:
        model: the module to train, not wrapped by a strategy.
        reduction: reduces a step's loss, BatchNorm statistics and ranges over all ranks.
    """

    def __init__(self, model: nn.Module, reduction: StepReduction) -> None:
        self.model = model
        self.reduction = reduction

    @abstractmethod
    def hooks(self, total_steps: int) -> Sequence[Hook]:
        """Returns the hooks of a stage of `total_steps` steps."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Evaluates `model`, which is the trained model or its moving average. Collective."""

    @abstractmethod
    def recalibrate(self, averaged: nn.Module) -> None:
        """Re-estimates the statistics of the moving average before it is evaluated. Collective."""
