"""Defines the interface between the loop and a stage: hooks, evaluation, recalibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from dist_train.models.recomputation import Recomputation
from dist_train.quantization.prepared import PreparedModel
from dist_train.training.evaluate import Evaluation
from dist_train.training.freezing import Freezing
from dist_train.training.hooks import Hook
from dist_train.training.parts import Parts
from dist_train.training.reduction import StepReduction


class Learner(ABC):
    """The stage's part of the loop.

    Attributes:
        model: the module to train, not wrapped by a strategy.
        reduction: reduces a step's loss, BatchNorm statistics and ranges over all ranks.
        names: from the names of the model's parameters to the float model's, where they differ.
        parts: what the stage's settings name, by the float model's names.
        freezing: freezes its part of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        reduction: StepReduction,
        parts: Parts | None = None,
        names: Mapping[str, str] | None = None,
        unfreeze_at: int | None = None,
        recomputed: Collection[str] = (),
    ) -> None:
        """
        Args:
            unfreeze_at: as in the stage's settings.
            recomputed: modules to compute anew in backward, by the float model's names.
        """
        self.model = model
        self.reduction = reduction
        self.names = dict(names or {})
        self.parts = Parts() if parts is None else parts  # one that only names blocks is False
        self.freezing = Freezing(model, reduction, self.parts, self.names, unfreeze_at)
        self._recomputed = list(recomputed)
        self._recomputation = Recomputation(model, () if isinstance(model, PreparedModel) else recomputed)

    @property
    def blocks(self) -> list[list[str]]:
        """Names of the modules of each block, for `Strategy.shard`."""
        if isinstance(self.model, PreparedModel):
            return self.model.modules_of_blocks(self.parts.blocks)
        return [[name] for name in self.parts.blocks]

    def recompute(self, on: bool) -> None:
        """Turns activation checkpointing on for steps, or off."""
        if isinstance(self.model, PreparedModel):
            self.model.recompute(self._recomputed if on else [])
        else:
            self._recomputation.turn(on)

    @abstractmethod
    def hooks(self, total_steps: int) -> Sequence[Hook]:
        """Returns the hooks of a stage of `total_steps` steps."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Evaluates `model`, which is the trained model or its moving average. Collective."""

    @abstractmethod
    def recalibrate(self, averaged: nn.Module) -> None:
        """Re-estimates the statistics of the moving average before it is evaluated. Collective."""
