"""Convolutions with `padding="same"` or `"valid"`, which no quantizer takes: the same padding written out as numbers.

Exact: "same" is only allowed with stride 1, where it adds dilation * (kernel - 1) zeros to each side pair, the odd one at the end.
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
    """As F.pad wants it: the last dimension first."""
    return [side for pair in reversed(pairs) for side in pair]


def number_paddings(model: nn.Module) -> None:
    """In place: convolutions whose sides are padded alike. The others stay as they are."""
    for module in model.modules():
        if isinstance(module, _ConvNd) and isinstance(module.padding, str):
            pairs = _pairs(module.padding, module.kernel_size, module.dilation)
            if all(before == after for before, after in pairs):
                module.padding = tuple(before for before, _ in pairs)


def refuse_uneven_padding(model: nn.Module) -> None:
    """Raises QuantizationError that names a convolution whose sides "same" pads unequally: it needs an operation more."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and isinstance(module.padding, str):
            pairs = _pairs(module.padding, module.kernel_size, module.dilation)
            if any(before != after for before, after in pairs):
                raise QuantizationError(
                    f"{name}: padding='same' with an even kernel pads unequally, which the eager backend cannot write out",
                    f"nn.ZeroPad2d({tuple(_flat(pairs))}) before it and padding=0, or --qat.backend pt2e or fx",
                )


def pad_before_modules(model: GraphModule) -> None:
    """In a symbolically traced model, in place: F.pad before the convolutions that `number_paddings` left.

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
    """In an exported graph, in place: every convolution with a padding by name, with a pad before it where sides differ."""
    for node in list(graph.nodes):
        if node.target not in _NUMBERED:
            continue
        given: Any = node.args
        source, weight, rest = given[0], given[1], given[2:]
        spatial = weight.meta["val"].dim() - 2
        defaults: list[Any] = [None, [1], "valid", [1], 1]
        bias, stride, padding, dilation, groups = list(rest) + defaults[len(rest) :]
        # One number for each dimension, as torchao's patterns of convolution and batch norm have them.
        stride, dilation = (each if len(each) == spatial else [*each] * spatial for each in (stride, dilation))
        pairs = _pairs(padding, weight.meta["val"].shape[2:], dilation)
        if any(before != after for before, after in pairs):
            source, pairs = _padded(graph, node, pairs), [(0, 0)] * spatial
        node.target = _NUMBERED[node.target]
        node.args = (source, weight, bias, stride, [before for before, _ in pairs], dilation, groups)


def part_from_convolutions(graph: Graph) -> None:
    """In an exported graph, in place: a convolution that pads with what is there (`padding_mode="reflect"`) is two operations.

    X86InductorQuantizer takes all operations of a module for its convolution, and fails on the pad.
    """
    for node in graph.find_nodes(op="call_function", target=aten.pad.default):
        sources = node.meta.get("source_fn_stack")
        if sources and isinstance(sources[-1][1], type) and issubclass(sources[-1][1], _ConvNd):
            node.meta["source_fn_stack"] = [*sources[:-1], (node.name, F.pad)]


def _padded(graph: Graph, node: Node, pairs: _Pairs) -> Node:
    """A node before the convolution `node` that pads its input."""
    source: Any = node.args[0]
    with graph.inserting_before(node):
        padded = graph.call_function(aten.pad.default, (source, _flat(pairs)))
    value = source.meta["val"]  # and no module: a quantizer would take the pad for the convolution itself
    with value.fake_mode:
        padded.meta["val"] = aten.pad.default(value, _flat(pairs))
    return padded
