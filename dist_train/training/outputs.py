"""Takes a model's outputs as a plain tree of floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_train.trees import Tree, leaves, map_leaves, plain


def in_float(outputs: Any, inputs: int, rows: int) -> Tree:
    """Returns a model's outputs as a plain tree, of the first `rows` of `inputs` rows; half precision as float32.

    Leaves without a row for each input, such as a number of the whole batch, stay as they are.
    """

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if rows != inputs and leaf.dim() and len(leaf) == inputs:
            leaf = leaf[:rows]
        return leaf.float() if leaf.is_floating_point() else leaf

    return taken(outputs) if isinstance(outputs, Tensor) else map_leaves(taken, plain(outputs))


def nothing_of(outputs: Tree) -> Tensor:
    """Returns 0 as a function of all outputs, so that its gradients are zeros of each parameter behind them."""
    if isinstance(outputs, Tensor):
        return outputs.float().sum() * 0
    return _Nothing.apply(*(leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad))


class _Nothing(torch.autograd.Function):
    """0 of outputs that need not be finite, as masked ones: a product with 0 would be NaN."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.like = [(each.shape, each.dtype, each.device) for each in outputs]
        return torch.zeros((), device=outputs[0].device if outputs else None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
