"""The interface of strategies; the loop never asks which one it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from dist_train.config.checks.strategy import Precision
from dist_train.distributed.world import World
from dist_train.errors import NonFiniteLossError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Below this scale fp16's range is wasted on its low end; GradScaler itself would halve the scale to 0 and skip every step.
_SMALLEST_LOSS_SCALE = 2.0**-10


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of an optimizer step.

    Attributes:
        grad_norm: L2 norm of all gradients before clipping, float32 [] on the device; None where it was not asked for.
        skipped: the gradients were not finite and the loss scale was lowered instead (fp16).
    """

    grad_norm: torch.Tensor | None = None
    skipped: bool = False


class Strategy(ABC):
    """Wraps a model for training and owns precision.

    Attributes:
        scaler: multiplies the loss so that fp16 gradients do not vanish; disabled in other precisions. Its state goes
            into checkpoints.
    """

    scaler: torch.amp.GradScaler

    def __init__(self, world: World, precision: Precision) -> None:
        """precision: resolved, no longer `auto`."""
        self.world = world
        self._precision = precision
        self.new_scaler()

    def new_scaler(self) -> None:
        """Makes a fresh `scaler` for a stage that begins; its scale belongs to that stage's gradients."""
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self._precision == "fp16")

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the module whose forward the loop calls in training."""

    @abstractmethod
    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which backward accumulates without averaging over ranks."""

    @abstractmethod
    def warm_up_buckets(self, wrapped: nn.Module, inputs: torch.Tensor) -> None:
        """Runs what the wrapper does differently in its first steps, so that a resumed run's first step is like any other.

        Leaves no gradients and no changed buffers behind.
        """

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context of forward and loss."""
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=_DTYPES[self._precision])

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float | None) -> StepOutcome:
        """Clips the gradients to `max_norm` and lets the optimizer take its step, unless fp16 gradients overflowed.

        All ranks agree on that, as they hold the same averaged gradients.

        Raises:
            NonFiniteLossError: gradients that are not finite though the loss is hardly scaled: it is not fp16's range.
        """
        self.scaler.unscale_(optimizer)  # the norm is that of the true gradients
        norm = None if max_norm is None else nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:
            return StepOutcome(norm)
        if before <= _SMALLEST_LOSS_SCALE:
            raise NonFiniteLossError(
                f"the gradients are not finite, though the loss is, and was scaled by no more than {before:g} for fp16",
                "--precision bf16 or fp32; in the loss and the model look for a root or a logarithm of 0",
            )
        return StepOutcome(skipped=True)
