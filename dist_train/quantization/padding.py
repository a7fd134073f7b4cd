"""Rewriting of `padding="same"` and `"valid"`, which no quantizer takes, to the same padding in numbers.

This is exact: "same" is only allowed with stride 1. It adds dilation * (kernel - 1) zeros to the two sides of a
    dimension
together, an odd one at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.conv import _ConvNd

from dist_train.errors import QuantizationError

aten = torch.ops.aten
_NUMBERED = {  # both take (input, weight, bias, stride, padding, dilation, groups)
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
_Pairs = list[tuple[int, int]]  # zeros before and after, of each spatial dimension


def _pairs(padding: str, kernel: Sequence[int], dilation: Sequence[int]) -> _Pairs:
    totals = [step * (size - 1) if padding == "same" else 0 for size, step in zip(kernel, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _flat(pairs: _Pairs) -> list[int]:
    """Returns the pairs as F.pad takes them: the last dimension first."""
    return [side for pair in reversed(pairs) for side in pair]


def number_paddings(model: nn.Module) -> None:
    """Gives numbers to convolutions with equal padding of both sides, in place. Others stay unchanged."""
    for module in model.modules():
        if isinstance(module, _ConvNd) and isinstance(module.padding, str):
            pairs = _pairs(module.padding, module.kernel_size, module.dilation)
            if all(before == after for before, after in pairs):
                module.padding = tuple(before for before, _ in pairs)


def refuse_uneven_padding(model: nn.Module) -> None:
    """Raises QuantizationError for a convolution with unequal padding, by name: it needs a separate pad operation."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and isinstance(module.padding, str):
            pairs = _pairs(module.padding, module.kernel_size, module.dilation)
            if any(before != after for before, after in pairs):
                raise QuantizationError(
                    f"{name}: padding='same' with an even kernel pads unequally, "
                    "which the eager backend cannot write out",
                    f"nn.ZeroPad2d({tuple(_flat(pairs))}) before it and padding=0, or --qat.backend pt2e or fx",
                )


def pad_before_modules(model: GraphModule) -> None:
    """Adds F.pad before the convolutions that `number_paddings` left, in a symbolically traced model, in place.

    Raises:
        QuantizationError: a functional convolution with a padding by name.
    """
    modules = dict(model.named_modules())
    uneven = {name: module for name, module in modules.items() if _is_uneven(module)}
    for node in list(model.graph.nodes):
        if node.op == "call_module" and node.target in uneven:
            module: Any = uneven[node.target]
            pairs = _pairs(module.padding, module.kernel_size, module.dilation)
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            with model.graph.inserting_before(node):
                node.args = (model.graph.call_function(F.pad, (node.args[0], _flat(pairs), mode)), *node.args[1:])
        elif node.target in _FUNCTIONS and {"same", "valid"} & {
            value for value in (*node.args, *node.kwargs.values()) if isinstance(value, str)
        }:
            raise QuantizationError(
                f"{node.name}: a functional convolution with a padding by name cannot be quantized by torch.fx",
                "use nn.Conv2d, give the padding as a number, or --qat.backend pt2e",
            )
    for module in uneven.values():
        module.padding, module.padding_mode = (0,) * len(module.kernel_size), "zeros"
    model.recompile()


def _is_uneven(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and isinstance(module.padding, str)


def number_graph_paddings(graph: Graph) -> None:
    """Gives numbers to every convolution of an exported graph, in place, with a pad before it where sides differ."""
    for node in list(graph.nodes):
        if node.target not in _NUMBERED:
            continue
        given: Any = node.args
        source, weight, rest = given[0], given[1], given[2:]
        spatial = weight.meta["val"].dim() - 2
        defaults: list[Any] = [None, [1], "valid", [1], 1]
        bias, stride, padding, dilation, groups = list(rest) + defaults[len(rest) :]
        # One number for each dimension, as in torchao's patterns of convolution and batch norm.
        stride, dilation = (each if len(each) == spatial else [*each] * spatial for each in (stride, dilation))
        pairs = _pairs(padding, weight.meta["val"].shape[2:], dilation)
        if any(before != after for before, after in pairs):
            source, pairs = _padded(graph, node, pairs), [(0, 0)] * spatial
        node.target = _NUMBERED[node.target]
        node.args = (source, weight, bias, stride, [before for before, _ in pairs], dilation, groups)


def part_from_convolutions(graph: Graph) -> None:
    """Separates the pads of convolutions (`padding_mode="reflect"`) from their modules, in an exported graph, in place.

    X86InductorQuantizer takes all operations of a module for its convolution, and fails on the pad.
    """
    for node in graph.find_nodes(op="call_function", target=aten.pad.default):
        sources = node.meta.get("source_fn_stack")
        if sources and isinstance(sources[-1][1], type) and issubclass(sources[-1][1], _ConvNd):
            node.meta["source_fn_stack"] = [*sources[:-1], (node.name, F.pad)]


def _padded(graph: Graph, node: Node, pairs: _Pairs) -> Node:
    """Adds a node that pads the input of the convolution `node`, and returns it."""
    source: Any = node.args[0]
    with graph.inserting_before(node):
        padded = graph.call_function(aten.pad.default, (source, _flat(pairs)))
    value = source.meta["val"]  # no module in meta: a quantizer would take the pad for the convolution itself
    with value.fake_mode:
        padded.meta["val"] = aten.pad.default(value, _flat(pairs))
    return padded
