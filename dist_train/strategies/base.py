"""What the loop asks of a strategy; the loop never asks which one it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from dist_train.world import World


@dataclass(frozen=True)
class StepOutcome:
    """What became of an optimizer step.

    Attributes:
        grad_norm: L2 norm of all gradients before clipping, float32 [] on the device; None where nothing was clipped.
        skipped: the gradients were not finite and the loss scale was lowered instead (fp16).
    """

    grad_norm: torch.Tensor | None = None
    skipped: bool = False


class Strategy(ABC):
    """Wraps a model for training and owns precision."""

    def __init__(self, world: World, precision: str) -> None:
        self.world = world
        self._precision = precision

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward the loop calls in training."""

    @abstractmethod
    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """A context in which backward accumulates without averaging over ranks."""

    @abstractmethod
    def settle(self, wrapped: nn.Module, inputs: torch.Tensor) -> None:
        """Runs what the wrapper does differently in its first steps, so that a resumed run's first step is like any other's.

        Leaves no gradients and no changed buffers behind.
        """

    def autocast(self) -> AbstractContextManager[object]:
        """The context of forward and loss."""
        if self._precision == "bf16":
            return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float | None) -> StepOutcome:
        """Clips the gradients to `max_norm` and lets the optimizer take its step."""
        norm = None if max_norm is None else nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        return StepOutcome(norm)
