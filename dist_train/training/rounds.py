"""Brings the loop its batches, and tells which steps count: all, where the ranks stay together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from dist_train.data.loader import StepBatch, TrainLoader
from dist_train.training.state import TrainState


class Rounds(ABC):
    """The batches of a stage's training.

    The loop calls `begin`, then `batches` for each epoch, `counts` after each batch's backward, `stopped` and `moved`
    when they end; after the last step `end`; and `leave` in any case.
    """

    @abstractmethod
    def begin(self, state: TrainState) -> None:
        """Meets those that train with this process."""

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[StepBatch]:
        """Yields this process's batches of an epoch from step `first` of it on."""

    @abstractmethod
    def counts(self) -> bool:
        """Tells whether the step counts; else model and gradients are as they were before it, and it comes again."""

    @abstractmethod
    def moved(self) -> bool:
        """Tells whether `batches` ended because the state is now that of another step."""

    @abstractmethod
    def stopped(self) -> bool:
        """Tells whether `batches` ended because this process was asked to stop while it waited for others."""

    @abstractmethod
    def end(self) -> None:
        """Takes leave after the last step."""

    @abstractmethod
    def leave(self) -> None:
        """Lets go of the others; does nothing after `end`."""


class Together(Rounds):
    """Rounds of ranks that stay together: every step counts."""

    def __init__(self, loader: TrainLoader, steps_per_epoch: int) -> None:
        self._loader, self._steps = loader, steps_per_epoch

    def begin(self, state: TrainState) -> None:
        return

    def batches(self, epoch: int, first: int) -> Iterator[StepBatch]:
        return self._loader.epoch(epoch, first, self._steps)

    def counts(self) -> bool:
        return True

    def moved(self) -> bool:
        return False

    def stopped(self) -> bool:
        return False

    def end(self) -> None:
        return

    def leave(self) -> None:
        return
