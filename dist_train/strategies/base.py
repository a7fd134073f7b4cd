"""Defines the interface of strategies. The loop never asks which strategy it has."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dist_train.config.checks.strategy import Precision
from dist_train.distributed.world import World
from dist_train.errors import NonFiniteLossError
from dist_train.strategies.shards import clip_grad_norm
from dist_train.trees import Tree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A smaller scale wastes fp16's range at its low end. GradScaler alone would halve the scale to 0 and skip every step.
_SMALLEST_LOSS_SCALE = 2.0**-10

Summed = Callable[[], torch.Tensor]
"""Returns sums over the ranks, float32 [N], once backward is done."""


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """In this context, forwards may change the model's buffers; at its end they are as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of an optimizer step.

    Attributes:
        grad_norm: L2 norm of all gradients before clipping, float32 [] on the device; None if not requested.
        skipped: True if the fp16 gradients were not finite, so the loss scale was lowered instead of a step.
    """

    grad_norm: torch.Tensor | None = None
    skipped: bool = False


class Strategy(ABC):
    """Wraps a model for training and applies the precision.

    Attributes:
        scaler: scales the loss so that fp16 gradients do not underflow; disabled in other precisions. Checkpoints hold
            its state.
        find_unused_parameters: True if the wrapper must expect steps in which parameters get no gradient; read by
            `wrap`.
        mesh: the device mesh that parameters are spread over; None where each rank holds them whole.
        carried: number of values that `summed_in_backward` gets at most; read by `wrap`.
        reshard_after_forward: False if a block in shards stays whole from forward to backward; read by `shard`.
    """

    scaler: torch.amp.GradScaler

    def __init__(self, world: World, precision: Precision) -> None:
        """precision: the resolved precision, never `auto`."""
        self.world = world
        self._precision = precision
        self.find_unused_parameters = False
        self.carried = 0
        self.reshard_after_forward = True
        self.mesh: DeviceMesh | None = None
        self.new_scaler()

    @property
    def several(self) -> bool:
        """True where the sums of a step are over several processes."""
        return self.world.world_size > 1

    @property
    def leaves_alone(self) -> bool:
        """True where a process that is asked to stop leaves the others, which go on; else all stop."""
        return False

    @property
    def rank(self) -> int:
        """Number of this process among those that share the step."""
        return self.world.rank

    def new_scaler(self) -> None:
        """Makes a fresh `scaler` at the start of a stage, because the scale depends on the stage's gradients."""
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self._precision == "fp16")

    def shard(self, model: nn.Module, blocks: Sequence[Sequence[str]] = ()) -> str:
        """Spreads the parameters of a model over the ranks, in place, before its optimizer is built. Collective.

        The default, for a strategy that keeps a whole model on each rank, does nothing.

        Args:
            blocks: names of modules, those of a block together; a rank holds one block whole at a time.

        Returns:
            a text for people on how it is spread; "" if it is not.
        """
        return ""

    def copy(self, model: nn.Module) -> nn.Module:
        """Returns a copy of a model, whose parameters are spread alike. Collective."""
        return copy.deepcopy(model)

    def unsharded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which each rank holds the whole model, and may call it as often as it likes. Collective.

        Outside of it, all ranks call a model in shards equally often.
        """
        return nullcontext()

    def whole(self, model: nn.Module, *, everywhere: bool = True) -> nn.Module | None:
        """Returns the model whole: a copy where it is in shards, else itself. Collective.

        everywhere: on each rank, on its device; else on rank 0 alone, on the CPU, and None on the others.
        """
        return model

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the module whose forward the loop calls in training."""

    @abstractmethod
    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which backward accumulates gradients without averaging them over ranks."""

    @abstractmethod
    def warm_up_buckets(self, wrapped: nn.Module, inputs: Tree) -> None:
        """Runs throwaway steps until the wrapper works as in any later step, so that resuming is exact.

        Leaves gradients and buffers as they were.
        """

    def summed_in_backward(self, loss: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, Summed]:
        """Sums float32 values [N] over the ranks during the backward of `loss`, a step's last one. Collective.

        Returns:
            the loss to call `backward` with, and a function that returns the sums once that is done.
        """
        return loss, self.world.start_all_reduce(values, "sum").wait

    def require_all_reduced(self, wrapped: nn.Module) -> None:
        """Checks that a step's backward averaged all gradients over the ranks. Called after each step's last backward.

        The default, for a strategy that averages nothing, does nothing.

        Raises:
            SetupError: parameters got no gradient, and the wrapper did not expect that.
        """
        return

    def require_same_replicas(self) -> None:
        """Raises SetupError if copies of the model within this rank differed in a step. Called before saves.

        The default, for a strategy without copies, does nothing.
        """
        return

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context of forward and loss."""
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=_DTYPES[self._precision])

    def backward(self, loss: torch.Tensor) -> None:
        """Runs backward on the scaled loss."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float | None) -> StepOutcome:
        """Clips the gradients to `max_norm` and steps the optimizer, unless fp16 gradients overflowed.

        `max_norm`: infinity only measures their norm.

        All ranks skip the same steps, because they hold the same averaged gradients.

        Raises:
            NonFiniteLossError: the gradients are not finite even at the smallest loss scale: fp16 is not the cause.
        """
        self.scaler.unscale_(optimizer)  # the norm is taken of the unscaled gradients
        norm = None if max_norm is None else clip_grad_norm(model.parameters(), max_norm)
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:
            return StepOutcome(norm)
        if before <= _SMALLEST_LOSS_SCALE:
            raise NonFiniteLossError(
                f"the gradients are not finite, but the loss is, even at fp16's smallest loss scale, {before:g}",
                "--precision bf16 or fp32; check loss and model for a root or a logarithm of 0",
            )
        return StepOutcome(skipped=True)
