"""Causes for which a prepared model's gradients are not the float model's, and what to write instead."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from dist_train.errors import QuantizationError
from dist_train.quantization.batch_norm_calls import has_own_forward

_NO_GRAD = (
    "freeze its parameters with requires_grad_(False) where the model is built, and call it without torch.no_grad(); "
    "x.detach() stops a gradient between layers"
)


def gradient_causes(model: nn.Module, inputs: Tensor) -> tuple[list[str], list[str]]:
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
    with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []), torch.enable_grad(), watch:
        outputs = copied(inputs)
    found, hints = list[str](), list[str]()
    for place in dict.fromkeys(watch.places):
        found.append(f"torch.no_grad() in the forward of {place or type(model).__name__}")
        hints.append(_NO_GRAD)
    for kind in sorted(_own_backwards(outputs)):
        found.append(f"the autograd.Function {kind}, whose backward is its own")
        hints.append(f"write {kind} in functions that torch differentiates, as x + (y - x).detach()")
    for name, norm in copied.named_modules():
        if isinstance(norm, _BatchNorm) and has_own_forward(norm):
            found.append(f"{name}, a {type(norm).__name__} with a forward of its own")
            hints.append("use nn.BatchNorm2d and the rest behind it")
            break
    return found, list(dict.fromkeys(hints))


def hidden_from_quantization(model: nn.Module, example: Tensor) -> QuantizationError:
    """Returns the error for a model that turns gradients off in its forward, where torch.export was asked to trace it.

    Args:
        example: as of `QuantizationBackend.prepare`.
    """
    causes, hints = gradient_causes(model, torch.zeros((2, *example.shape[1:]), dtype=example.dtype).to(example.device))
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
    waiting = [outputs.grad_fn] if isinstance(outputs, Tensor) else []
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
