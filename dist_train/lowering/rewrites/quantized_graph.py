"""Weights of a graph with quantize and dequantize operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_DEQUANTIZE = (
    "quantized_decomposed.dequantize_per_channel.default",
    "quantized_decomposed.dequantize_per_tensor.default",
)


def value_of(graph: GraphModule, node: Any) -> Tensor | None:
    """Returns the parameter or buffer that a node reads; None where the node is computed."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    return value if isinstance(value, Tensor) else None


def dequantized_weights(graph: GraphModule) -> Iterator[tuple[Node, Tensor, Any, Any]]:
    """Yields dequantize operator, integer weight, scale and zero point of each weight.

    Scale and zero point are float32 and int64 [K], or one number for all channels.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or str(node.target) not in _DEQUANTIZE:
            continue
        weight = value_of(graph, node.args[0])
        if weight is not None:
            parts = (value_of(graph, part) if isinstance(part, Node) else part for part in node.args[1:3])
            yield node, weight, *parts


def channels_with_zero_points(graph: GraphModule) -> list[str]:
    """Returns the names of the weights with a zero point other than 0 in some channel."""
    return [
        str(node.args[0])
        for node, _, _, zero_point in dequantized_weights(graph)
        if "per_channel" in str(node.target) and torch.as_tensor(zero_point).any()
    ]
