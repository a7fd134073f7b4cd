"""Trains by DistributedDataParallel on any number of ranks: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train import trees
from dist_train.errors import SetupError
from dist_train.strategies.base import Strategy, Summed, kept_buffers
from dist_train.trees import Tree

# torch 2.15 renamed the argument and warns about the old name.
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_NO_BROADCAST: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}
_SHOWN = 4
_CARRIER = "_carried"


class _Carry(torch.autograd.Function):
    """Passes the loss on; in backward gives the carrier the values as its gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, carrier: Tensor, values: Tensor) -> Tensor:
        ctx.values = values
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.values, None


class DDP(Strategy):
    """Lets DDP average the gradients, but not broadcast buffers; training/reduction.py reduces those.

    DDP's broadcast would keep BatchNorm statistics and quantization ranges of rank 0's data only (pytorch#85627).
    """

    _carrier: nn.Parameter | None = None
    _names: Sequence[str] = ()

    def wrap(self, model: nn.Module) -> nn.Module:
        device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        self._carrier = None
        name = _CARRIER
        while hasattr(model, name):
            name += "_"
        # Where DDP looks for unused parameters, it looks from the outputs of forward, of which the carrier is none.
        if self.carried and self.world.world_size > 1 and not self.find_unused_parameters:
            self._carrier = nn.Parameter(torch.zeros(self.carried, device=self.world.device))
            model.register_parameter(name, self._carrier)
        self._names = [name for name, each in model.named_parameters() if each.requires_grad]
        try:
            return DistributedDataParallel(
                model,
                device_ids=device_ids,
                gradient_as_bucket_view=True,
                find_unused_parameters=self.find_unused_parameters,
                **_NO_BROADCAST,
            )
        finally:
            model._parameters.pop(name, None)  # only the reducer has it: it is no part of the model

    def summed_in_backward(self, loss: Tensor, values: Tensor) -> tuple[Tensor, Summed]:
        """Lets the values travel in a bucket of the gradients: no collective of their own, nothing to wait for."""
        carrier, ranks = self._carrier, self.world.world_size
        if carrier is None:
            return super().summed_in_backward(loss, values)

        def summed() -> Tensor:
            assert carrier.grad is not None
            sums, carrier.grad = carrier.grad[: len(values)].clone(), None
            return sums

        # DDP divides by the number of ranks.
        padded = torch.zeros_like(carrier)
        torch.mul(values, ranks, out=padded[: len(values)])
        return _Carry.apply(loss, carrier, padded), summed

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(wrapped, DistributedDataParallel)
        context: AbstractContextManager[None] = wrapped.no_sync()
        return context

    def warm_up_buckets(self, wrapped: nn.Module, inputs: Tree) -> None:
        warm_up_ddp(self, wrapped, inputs)

    def require_all_reduced(self, wrapped: nn.Module) -> None:
        assert isinstance(wrapped, DistributedDataParallel)
        require_all_reduced(wrapped, self._names)


def warm_up_ddp(strategy: Strategy, wrapped: nn.Module, inputs: Tree) -> None:
    """Runs two throwaway steps of a DistributedDataParallel, after which its buckets keep their order.

    DDP rebuilds its buckets at the second forward. On three or more ranks the bucket order changes the order of sums.
    The first step of a resumed run would then differ in the last bits.
    """
    with kept_buffers(wrapped):
        for _ in range(2):
            with strategy.autocast():
                outputs = trees.call(wrapped, inputs)
            zero = sum_of_zeros(outputs)
            loss, summed = strategy.summed_in_backward(zero, torch.zeros(1, device=zero.device))
            loss.backward()
            strategy.require_all_reduced(wrapped)
            summed()
    wrapped.zero_grad(set_to_none=True)


def sum_of_zeros(outputs: Any) -> Tensor:
    """Returns a loss of 0 that reads every output of a model which has a gradient."""
    if isinstance(outputs, Tensor):
        return (outputs.float() * 0).sum()
    leaves = [leaf for leaf in trees.leaves(trees.plain(outputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([(leaf.float() * 0).sum() for leaf in leaves]).sum()


def require_all_reduced(wrapped: DistributedDataParallel, names: Sequence[str]) -> None:
    """Checks that DDP reduced the gradients of all parameters, of which `names` are the names in DDP's order.

    DDP itself says so at the next forward only: the optimizer would already have used gradients of this rank alone.

    Raises:
        SetupError: it did not; names the parameters without a gradient.
    """
    try:
        wrapped._check_reducer_finalized()
    except RuntimeError as error:
        listed = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        unused = [names[int(index)].removeprefix("_orig_mod.") for index in listed[1].split()] if listed else []
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        which = f"{', '.join(unused[:_SHOWN])}{more}"
        raise SetupError(
            f"a step on rank {dist.get_rank()} did not use the parameters {which}, as others did",
            "--find_unused_parameters true",
        ) from error
