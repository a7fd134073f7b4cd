"""Causes for which a prepared model's gradients are not the float model's, and what to write instead."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from dist_train import trees
from dist_train.errors import QuantizationError
from dist_train.programs.signature import rows
from dist_train.quantization.batch_norm_calls import has_own_forward
from dist_train.trees import Tree

_NO_GRAD = (
    "freeze its parameters with requires_grad_(False) where the model is built, and call it without torch.no_grad(); "
    "x.detach() stops a gradient between layers"
)


def gradient_causes(model: nn.Module, inputs: Tree) -> tuple[list[str], list[str]]:
    """Looks for what backends lose: torch.no_grad(), functions and batch norms of the model's own.

    Args:
        model: float, left unchanged.
        inputs: [B, ...]; a batch that the model trains on.

    Returns:
        phrases that name each cause and its place; and a hint for each.
    """
    copied = copy.deepcopy(model).train()
    around = [""]
    for name, module in copied.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: around.append(name))
        module.register_forward_hook(lambda module, args, output: _left(around))
    watch = _GradientsOff(around)
    with torch.random.fork_rng(devices=_devices(inputs)), torch.enable_grad(), watch:
        outputs = trees.call(copied, inputs)
    found, hints = list[str](), list[str]()
    for place in dict.fromkeys(watch.places):
        found.append(f"torch.no_grad() in the forward of {place or type(model).__name__}")
        hints.append(_NO_GRAD)
    for kind in sorted(_own_backwards(outputs)):
        found.append(f"the autograd.Function {kind}, whose backward is its own")
        hints.append(f"write {kind} in functions that torch differentiates, as x + (y - x).detach()")
    for place in branching_on_mode(model, inputs):
        found.append(f"a branch on self.training in the forward of {place}")
        hints.append("let forward compute the same in both modes; noise and dropout in training are allowed")
    for name, norm in copied.named_modules():
        if isinstance(norm, _BatchNorm) and has_own_forward(norm):
            found.append(f"{name}, a {type(norm).__name__} with a forward of its own")
            hints.append("use nn.BatchNorm2d and the rest behind it")
            break
    return found, list(dict.fromkeys(hints))


@torch.no_grad()
def branching_on_mode(model: nn.Module, inputs: Tree) -> list[str]:
    """Returns the modules whose own forward computes otherwise where `self.training` holds, by name.

    Backends trace the model in evaluation mode and lose that.
    """
    copied = copy.deepcopy(model).eval()
    expected, found = _seeded(copied, inputs), list[str]()
    for name, module in copied.named_modules():
        if isinstance(module, _BatchNorm) or type(module).__module__.startswith("torch."):
            continue
        module.training = True
        if not _alike(_seeded(copied, inputs), expected):
            found.append(name or type(model).__name__)
        module.training = False
    return found


@torch.no_grad()
def refuse_random(model: nn.Module, inputs: Tree) -> None:
    """Raises QuantizationError for a model that gives other outputs for the same rows in evaluation mode."""
    copied = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=_devices(inputs)):
        first, second = trees.call(copied, inputs), trees.call(copied, inputs)
    if not _alike(first, second):
        raise QuantizationError(
            f"{type(model).__name__} is random in evaluation mode: two passes of the same rows differ, "
            "so that nobody could tell whether integers compute what it does",
            "draw random numbers in training only: nn.Dropout(p), F.dropout(x, p, self.training), "
            "`if self.training:` around torch.randn",
        )


def _seeded(model: nn.Module, inputs: Tree) -> object:
    with torch.random.fork_rng(devices=_devices(inputs)):
        torch.manual_seed(0)
        return trees.call(model, inputs)


def _devices(inputs: Tree) -> list[torch.device]:
    """Returns the device whose random state is kept besides the CPU's."""
    device = trees.first_leaf(inputs).device
    return [device] if device.type == "cuda" else []


def _alike(outputs: object, others: object) -> bool:
    pairs = zip(trees.leaves(trees.plain(outputs)), trees.leaves(trees.plain(others)), strict=False)
    return all(_alike_leaves(one, other) for one, other in pairs)


def _alike_leaves(one: object, other: object) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True  # outputs of another kind are refused elsewhere
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)


def hidden_from_quantization(model: nn.Module, example: Tree) -> QuantizationError:
    """Returns the error for a model that turns gradients off in its forward, where torch.export was asked to trace it.

    Args:
        example: as of `QuantizationBackend.prepare`.
    """
    device = trees.first_leaf(example).device
    causes, hints = gradient_causes(model, trees.map_leaves(lambda leaf: leaf.to(device), rows(example, 2)))
    return QuantizationError(
        f"{type(model).__name__} turns gradients off, and torch.export hides what is called there from quantization: "
        f"it has {', and '.join(causes) or 'a part that is called under torch.no_grad()'}",
        "; ".join(hints or [_NO_GRAD]),
    )


def _left(around: list[str]) -> None:
    around.pop()


class _GradientsOff(TorchFunctionMode):
    """Records in which modules' forwards gradients are turned off. `around` holds the names of the entered ones."""

    def __init__(self, around: list[str]) -> None:
        super().__init__()
        self._around, self.places = around, list[str]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._C._set_grad_enabled and args and args[0] is False:
            self.places.append(self._around[-1])
        return function(*args, **(kwargs or {}))


def _own_backwards(outputs: object) -> set[str]:
    """Returns the names of the autograd.Functions of which a tensor's gradient is computed."""
    waiting = [each.grad_fn for each in trees.leaves(trees.plain(outputs)) if isinstance(each, Tensor)]
    seen, found = set[object](), set[str]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            found.add(type(node).__name__.removesuffix("Backward"))
        waiting += [before for before, _ in node.next_functions]
    return found
