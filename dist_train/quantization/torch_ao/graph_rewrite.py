"""Rewriting of a traced model before torch.ao prepares it, where torch.ao would stop or lose a number."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

_CONVOLUTIONS: dict[Any, int] = {  # to the spatial dimensions
    **{F.conv1d: 1, F.conv2d: 2, F.conv3d: 3},
    **{torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3},
}
_CONVOLUTION_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_ADDITIONS: tuple[Any, ...] = (torch.add, "add", "add_")


def write_out_factors(graph: GraphModule) -> None:
    """Writes `torch.add(a, b, alpha=2)` as `a + b * 2`, in place: torch.ao's kernel of a sum has no factor."""
    for node in list(graph.graph.nodes):
        if node.op.startswith("call_") and node.target in _ADDITIONS and "alpha" in node.kwargs:
            first, other = (*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs))[:2]
            with graph.graph.inserting_before(node):
                scaled = graph.graph.call_function(operator.mul, (other, node.kwargs["alpha"]))
            node.args, node.kwargs = (first, scaled), {}
    graph.recompile()


def write_out_convolutions(graph: GraphModule) -> None:
    """Gives functional convolutions all their arguments, in place: torch.ao packs weights by position."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _CONVOLUTIONS:
            names = ("input", "weight", *_CONVOLUTION_DEFAULTS)
            given = _CONVOLUTION_DEFAULTS | dict(zip(names, node.args, strict=False)) | node.kwargs
            for name in ("stride", "padding", "dilation"):
                if isinstance(given[name], int):
                    given[name] = [given[name]] * _CONVOLUTIONS[node.target]
            node.args, node.kwargs = tuple(given[name] for name in names), {}
    graph.recompile()


def hidden_layers(graph: GraphModule) -> list[str]:
    """Returns the layers inside torch's own modules (nn.TransformerEncoderLayer): the graph calls only the whole one.

    torch.ao would fake-quantize their weights and leave them so.
    """
    called = {str(node.target) for node in graph.graph.find_nodes(op="call_module")}
    inside = ((name, part) for name in called for part, _ in graph.get_submodule(name).named_modules() if part)
    return [f"{name}.{part}" for name, part in inside]


def part_batch_norms(graph: GraphModule) -> list[str]:
    """Adds an nn.Identity before each batch norm of a transposed convolution, in place, and returns their names.

    torch.ao folds such batch norms at conversion only, and refuses them in training. `remove_calls` undoes this after
    torch.ao looked for pairs. The batch norm then has integers of its own.
    """
    modules, added = dict(graph.named_modules(remove_duplicate=False)), list[str]()
    for node in graph.graph.find_nodes(op="call_module"):
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if (
            source is not None
            and source.op == "call_module"
            and isinstance(modules[str(node.target)], _BatchNorm)
            and isinstance(modules[str(source.target)], _ConvTransposeNd)
        ):
            added.append(f"_apart_{len(added)}")
            graph.add_module(added[-1], nn.Identity())
            with graph.graph.inserting_before(node):
                node.replace_input_with(source, graph.graph.call_module(added[-1], (source,)))
    graph.recompile()
    return added


def remove_calls(graph: GraphModule, names: Collection[str]) -> None:
    """Removes the modules `names`, which return their input, in place."""
    for node in graph.graph.find_nodes(op="call_module"):
        if node.target in names:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)
    for name in names:
        delattr(graph, name)
    graph.recompile()
