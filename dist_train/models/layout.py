"""The layout of a model: the same parameters and buffers on all ranks, each with memory of its own."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dist_train.distributed.world import World
from dist_train.errors import ModelError


def require_one_layout(model: nn.Module, world: World) -> None:
    """Checks that all ranks have built the same model, by names, shapes and dtypes. Collective.

    Raises:
        ModelError: they have not; names the first difference.
    """
    own = {name: _described(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    if len(set(world.gather(hashlib.sha256(repr(own).encode()).hexdigest()))) == 1:
        return
    ranks = world.gather(own)
    for rank, other in enumerate(ranks):
        for name in [*ranks[0], *other]:
            if ranks[0].get(name) != other.get(name):
                shown = [
                    f"{each[name]} on rank {at}" if name in each else f"missing on rank {at}"
                    for at, each in ((0, ranks[0]), (rank, other))
                ]
                raise ModelError(
                    f"the ranks have built different models: {name} is {' and '.join(shown)}",
                    "build it from the config alone; what depends on the rank belongs into no parameter",
                )


@torch.no_grad()
def own_memory(model: nn.Module) -> None:
    """Gives each buffer whose elements share memory (`torch.ones(1).expand(8)`) memory of its own, in place.

    Nothing can be loaded into such a buffer, so that no checkpoint could be resumed.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or is_lazy(buffer):
                continue
            if any(size > 1 and step == 0 for size, step in zip(buffer.shape, buffer.stride(), strict=True)):
                module._buffers[name] = buffer.contiguous()


def _described(tensor: torch.Tensor) -> str:
    shape = "of no shape yet" if is_lazy(tensor) else list(tensor.shape)
    return f"{shape} {str(tensor.dtype)[6:]}"
