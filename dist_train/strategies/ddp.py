"""Trains by DistributedDataParallel on any number of ranks: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import inspect
import re
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.errors import SetupError
from dist_train.strategies.base import Strategy

# torch 2.15 renamed the argument and warns about the old name.
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}
_SHOWN = 4


class DDP(Strategy):
    """Lets DDP average the gradients, but not broadcast buffers; training/reduction.py reduces those.

    DDP's broadcast would keep BatchNorm statistics and quantization ranges of rank 0's data only (pytorch#85627).
    """

    def wrap(self, model: nn.Module) -> nn.Module:
        device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=device_ids,
            gradient_as_bucket_view=True,
            find_unused_parameters=self.find_unused_parameters,
            **_NO_BROADCAST,
        )

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(wrapped, DistributedDataParallel)
        context: AbstractContextManager[None] = wrapped.no_sync()
        return context

    def warm_up_buckets(self, wrapped: nn.Module, inputs: torch.Tensor) -> None:
        warm_up_ddp(self, wrapped, inputs)

    def require_all_reduced(self, wrapped: nn.Module) -> None:
        assert isinstance(wrapped, DistributedDataParallel)
        require_all_reduced(wrapped, wrapped.module)


def warm_up_ddp(strategy: Strategy, wrapped: nn.Module, inputs: torch.Tensor) -> None:
    """Runs two throwaway steps of a DistributedDataParallel, after which its buckets keep their order.

    DDP rebuilds its buckets at the second forward. On three or more ranks the bucket order changes the order of sums.
    The first step of a resumed run would then differ in the last bits.
    """
    buffers = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
    for _ in range(2):
        with strategy.autocast():
            outputs = wrapped(inputs)
        (outputs.float() * 0).sum().backward()
        strategy.require_all_reduced(wrapped)
    wrapped.zero_grad(set_to_none=True)
    for name, buffer in wrapped.named_buffers():
        buffer.copy_(buffers[name])


def require_all_reduced(wrapped: DistributedDataParallel, model: nn.Module) -> None:
    """Checks that DDP reduced the gradients of all parameters of `model`, the innermost module.

    DDP itself says so at the next forward only: the optimizer would already have used gradients of this rank alone.

    Raises:
        SetupError: it did not; names the parameters without a gradient.
    """
    try:
        wrapped._check_reducer_finalized()
    except RuntimeError as error:
        names = [name.removeprefix("_orig_mod.") for name, each in model.named_parameters() if each.requires_grad]
        listed = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        unused = [names[int(index)] for index in listed[1].split()] if listed else []
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        raise SetupError(
            f"a step on this rank did not use the parameters {', '.join(unused[:_SHOWN])}{more}, as others did",
            "--find_unused_parameters true",
        ) from error
