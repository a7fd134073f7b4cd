"""Trains by nn.DataParallel over the visible GPUs of one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import SetupError
from dist_train.strategies.base import Strategy


class DP(Strategy):
    """Splits each micro-batch over the GPUs; all outputs and the loss are on the first GPU."""

    def wrap(self, model: nn.Module) -> nn.Module:
        self._replicated = Replicated(model)
        return self._replicated

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up_buckets(self, wrapped: nn.Module, inputs: Tensor) -> None:
        return

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._replicated.fold()

    def require_same_replicas(self) -> None:
        self._replicated.require_same_buffers()


class Replicated(nn.DataParallel[nn.Module]):
    """A DataParallel that merges the buffers of its replicas; torch keeps only the first GPU's."""

    def __init__(self, module: nn.Module, device_ids: Sequence[int] | None = None) -> None:
        super().__init__(module, device_ids)
        self._used: list[tuple[nn.Module, int]] = []
        self._differ: dict[str, Tensor] = {}

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        outputs = super().parallel_apply(replicas, inputs, kwargs)
        self._used = [(replica, len(arguments[0])) for replica, arguments in zip(replicas, inputs, strict=True)]
        return outputs

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


def _differs(copy: Tensor, first: Tensor) -> Tensor:
    """Tells whether any value differs; NaN equals NaN."""
    return ((copy != first) & ~((copy != copy) & (first != first))).any()
