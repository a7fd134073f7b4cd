"""Calls of F.batch_norm by a float model: their arguments, and which normalize by the batch in training."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from dist_train import trees
from dist_train.programs.signature import rows
from dist_train.trees import Tree


def settled_batch_norms(model: nn.Module, example: Tree) -> list[str]:
    """Returns the batch norms that normalize by their running statistics in training mode, too, by name.

    A `train()` of the model's own may keep them in evaluation mode, or a subclass of BatchNorm never asks for the mode.

    Args:
        model: a copy, which is changed.
        example: as of `QuantizationBackend.prepare`.
    """
    model.train()
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    settled = [name for name, module in found.items() if not module.training]
    own = {name: module for name, module in found.items() if module.training and has_own_forward(module)}
    if not own:
        return settled
    seen = _Normalizations()
    device = trees.first_leaf(example).device
    inputs = trees.map_leaves(lambda leaf: leaf.to(device), rows(example, 2))
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), seen:
        trees.call(model, inputs)
    return settled + [name for name, module in own.items() if seen.training.get(id(module.running_var)) is False]


class _Normalizations(TorchFunctionMode):
    """Records how F.batch_norm is called: the id of a running variance, to whether the batch normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.training = dict[int, bool]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            call = batch_norm_call(args, kwargs or {})
            self.training[id(call["running_var"])] = bool(call["training"])
        return function(*args, **(kwargs or {}))


def batch_norm_call(args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a call of F.batch_norm, by name."""
    bound = inspect.signature(F.batch_norm).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def has_own_forward(norm: nn.Module) -> bool:
    """Tells whether a BatchNorm's forward is not torch's."""
    return not type(norm).forward.__module__.startswith("torch.")
