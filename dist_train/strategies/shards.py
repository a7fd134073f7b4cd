"""Tensors in shards: torch's DTensors, of which each rank holds some of the rows. Other tensors pass unchanged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train.run_dir.shards import in_shards
from dist_train.trees import Tree, map_leaves


def has_shards(model: nn.Module) -> bool:
    """Tells whether a model has parameters in shards. Inside `Strategy.unsharded` it has none."""
    return any(in_shards(each) for each in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard, which shares its memory with the tensor; may be empty. A plain tensor is its own."""
    return tensor.to_local() if in_shards(tensor) else tensor


@torch.no_grad()
def gathered(tree: Tree, *, everywhere: bool = False) -> Tree:
    """Returns a tree with its tensors whole. Collective where there are shards.

    everywhere: on each rank; else on rank 0, and None in the place of tensors in shards on the others.
    """

    def whole(leaf: Any) -> Any:
        if not in_shards(leaf):
            return leaf
        full = leaf.full_tensor().detach()
        return full if everywhere or dist.get_rank() == 0 else None

    return map_leaves(whole, tree)


def placed(value: Any, like: Any) -> Any:
    """Returns a whole tensor, equal on all ranks, spread as `like`; each rank cuts out its own shard.

    A value that is in shards already, and one that is not for `like`, is returned as it is.
    """
    if not in_shards(like) or in_shards(value) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clips as `nn.utils.clip_grad_norm_`; returns the L2 norm of the whole gradients. Collective where in shards."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    whole: Tensor = norm.full_tensor() if in_shards(norm) else norm
    return whole
