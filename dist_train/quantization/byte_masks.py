"""Masks of gradients that Inductor's kernels store fast: bytes, made by arithmetic.

Inductor's kernels for CPUs store bools one by one, so that a kernel which also gives a mask takes ten times as long (torch 2.14;
benchmarks/qat_step.py --profile). In a float model nothing is lost by it: what follows an activation keeps the activation's output for its
own backward, and the mask is made of that one there. With fake quantization in between the output is not kept, but a mask of it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

aten = torch.ops.aten
_BOUNDS = {  # of the output; None: the node's own arguments
    aten.relu.default: (0.0, float("inf")),
    aten.relu_.default: (0.0, float("inf")),
    aten.relu6.default: (0.0, 6.0),
    aten.relu6_.default: (0.0, 6.0),
    aten.hardtanh.default: None,
    aten.hardtanh_.default: None,
}
_IN_PLACE = (aten.relu_.default, aten.relu6_.default, aten.hardtanh_.default)


def equal(left: Tensor, right: Tensor) -> Tensor:
    """uint8, 1 where two tensors of integral values are equal, else 0."""
    if torch.compiler.is_compiling():
        return (1.0 - (left - right).abs().clamp(max=1.0)).to(torch.uint8)
    return (left == right).to(torch.uint8)


class _Bounded(torch.autograd.Function):
    """As `hardtanh`, and for an infinite `high` as `relu`: the gradient passes strictly between the bounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        y = x.clamp(min=low) if high == float("inf") else x.clamp(low, high)
        inside = torch.sign(y - low)
        if high != float("inf"):
            inside = inside * torch.sign(high - y)
        ctx.save_for_backward(inside.to(torch.uint8))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside.to(grad.dtype), None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """x clamped to low..high. Any shape, floating point."""
    if torch.compiler.is_compiling():
        result: Tensor = _Bounded.apply(x, low, high)
        return result
    return torch.relu(x) if high == float("inf") and low == 0 else torch.nn.functional.hardtanh(x, low, high)


def _bounds(min_val: float = -1.0, max_val: float = 1.0) -> tuple[float, float]:
    """As the operator's signature has them."""
    return min_val, max_val


def use_byte_masks(graph: Graph) -> None:
    """Training: activations that clamp remember in bytes where they did."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _BOUNDS:
            continue
        source: Any = node.args[0]
        if node.target in _IN_PLACE and len(source.users) > 1:
            continue  # the others read what it wrote
        low, high = _BOUNDS[node.target] or _bounds(*node.args[1:], **node.kwargs)
        node.target, node.args, node.kwargs = bounded, (source, low, high), {}
