"""Trains by nn.DataParallel over the visible GPUs of one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dist_train import trees
from dist_train.errors import SetupError
from dist_train.strategies.base import StepOutcome, Strategy
from dist_train.trees import Tree


class DP(Strategy):
    """Splits each micro-batch over the GPUs; all outputs and the loss are on the first GPU."""

    def wrap(self, model: nn.Module) -> nn.Module:
        self._replicated = Replicated(model)
        self._replicated.notes_gradients = self.find_unused_parameters
        return self._replicated

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up_buckets(self, wrapped: nn.Module, inputs: Tree) -> None:
        return

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._replicated.fold()

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float | None) -> StepOutcome:
        self._replicated.drop_zero_gradients()
        return super().step(optimizer, model, max_norm)

    def require_same_replicas(self) -> None:
        self._replicated.require_same_buffers()


class Replicated(nn.DataParallel[nn.Module]):
    """A DataParallel that merges the buffers of its replicas; torch keeps only the first GPU's.

    Attributes:
        notes_gradients: True if `drop_zero_gradients` must know which parameters a step used.
    """

    notes_gradients = False

    def __init__(self, module: nn.Module, device_ids: Sequence[int] | None = None) -> None:
        super().__init__(module, device_ids)
        self._used: list[tuple[nn.Module, int]] = []
        self._differ: dict[str, Tensor] = {}
        self._reached: set[str] | None = None

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        if self.notes_gradients:
            self._note_gradients(replicas)
        outputs = super().parallel_apply(replicas, inputs, kwargs)
        given = [positional or named for positional, named in zip(inputs, kwargs, strict=True)]
        self._used = [(replica, trees.rows_of(each)) for replica, each in zip(replicas, given, strict=True)]
        return [trees.plain(each) for each in outputs]  # torch gathers dicts and tuples only

    def _note_gradients(self, replicas: Sequence[nn.Module]) -> None:
        if self._reached is None:
            self._reached = set()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                for replica in replicas:
                    copy: Tensor = attrgetter(name)(replica)
                    copy.register_hook(partial(_note, self._reached, name))

    def drop_zero_gradients(self) -> None:
        """Removes the gradients of parameters that no replica used since the last call.

        Backward of torch's broadcast gives such a parameter zeros, by which momentum and decay would change it.
        """
        if self._reached is not None:
            for name, parameter in self.module.named_parameters():
                if name not in self._reached:
                    parameter.grad = None
        self._reached = None

    @torch.no_grad()
    def fold(self) -> None:
        """Merges the replicas' buffers into the module. Called after backward, which may still read them.

        BatchNorm's running statistics are averaged by rows, as over ranks (training/reduction.py). A step's ranges are
        merged by minimum and maximum. Whether any other buffer differed is recorded, without waiting for the GPUs.
        """
        replicas, self._used = self._used, []
        if not replicas:
            return
        rows = sum(count for _, count in replicas)
        named = [dict(replica.named_buffers()) for replica, _ in replicas]
        for name, buffer in self.module.named_buffers():
            copies = [buffers[name].to(buffer.device, non_blocking=True) for buffers in named]
            kind = name.rpartition(".")[2]
            if kind in ("running_mean", "running_var"):
                # Averages the differences from the first replica, so that unchanged statistics are not rounded.
                shares = [
                    (copy - copies[0]) * (count / rows) for copy, (_, count) in zip(copies, replicas, strict=True)
                ]
                buffer.copy_(copies[0] + torch.stack(shares).sum(0))
            elif kind == "step_low":
                buffer.copy_(torch.stack(copies).amin(0))
            elif kind == "step_high":
                buffer.copy_(torch.stack(copies).amax(0))
            else:
                different = torch.stack([_differs(copy, copies[0]) for copy in copies]).any()
                self._differ[name] = self._differ[name] | different if name in self._differ else different

    def require_same_buffers(self) -> None:
        """Checks the steps so far.

        Raises:
            SetupError: a buffer that is not merged differed between the replicas: only the first GPU's is kept.
        """
        if not self._differ:
            return
        differ = torch.stack([*self._differ.values()]).tolist()
        found = [name for name, differs in zip(self._differ, differ, strict=True) if differs]
        if found:
            raise SetupError(
                f"the buffer {found[0]} differs between the GPUs after a step: under dp only the first one's is kept",
                "--strategy ddp, and compute it from synchronised values; or train on one GPU: CUDA_VISIBLE_DEVICES=0",
            )


def _note(reached: set[str], name: str, gradient: Tensor | None) -> None:
    """Notes a replica's parameter; torch calls the hooks of unused outputs, too, with None."""
    if gradient is not None:
        reached.add(name)


def _differs(copy: Tensor, first: Tensor) -> Tensor:
    """Tells whether any value differs; NaN equals NaN."""
    return ((copy != first) & ~((copy != copy) & (first != first))).any()
