"""Gradient masks as bytes, computed by arithmetic, because Inductor's kernels store bytes fast and bools slowly.

Inductor's CPU kernels store bools one by one: a kernel that also writes a bool mask takes ten times as long (torch
2.14; benchmarks/qat_step.py --profile). A float model does not suffer from it: the operator after an activation keeps
the activation's output for its own backward, and the mask is computed from that output. With fake quantization in
between, not the output is kept but a mask of it.
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


def equal_mask(left: Tensor, right: Tensor) -> Tensor:
    """Returns a uint8 mask: 1 where two tensors of integral values are equal, else 0."""
    if torch.compiler.is_compiling():
        return (1.0 - (left - right).abs().clamp(max=1.0)).to(torch.uint8)
    return (left == right).to(torch.uint8)


class _ClampWithByteMask(torch.autograd.Function):
    """`hardtanh`, or `relu` for an infinite `high`: the gradient passes strictly between the bounds."""

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


def clamp_with_byte_mask(x: Tensor, low: float, high: float) -> Tensor:
    """Clamps x, of any shape and floating point, to low..high."""
    if torch.compiler.is_compiling():
        result: Tensor = _ClampWithByteMask.apply(x, low, high)
        return result
    return torch.relu(x) if high == float("inf") and low == 0 else torch.nn.functional.hardtanh(x, low, high)


def _hardtanh_bounds(min_val: float = -1.0, max_val: float = 1.0) -> tuple[float, float]:
    """The signature of aten.hardtanh after its input."""
    return min_val, max_val


def use_byte_masks(graph: Graph) -> None:
    """Replaces clamping activations of a training graph, in place, by `clamp_with_byte_mask`."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _BOUNDS:
            continue
        source: Any = node.args[0]
        if node.target in _IN_PLACE and len(source.users) > 1:
            continue  # its other users read the activation's output
        low, high = _BOUNDS[node.target] or _hardtanh_bounds(*node.args[1:], **node.kwargs)
        node.target, node.args, node.kwargs = clamp_with_byte_mask, (source, low, high), {}
