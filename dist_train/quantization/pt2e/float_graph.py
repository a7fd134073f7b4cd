"""Corrections of an exported float graph, before fake quantization is placed: things that torchao takes for others."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from dist_train.errors import QuantizationError
from dist_train.programs.modes import mode_blocks
from dist_train.quantization.fx_nodes import module_of

_aten = torch.ops.aten
_NEUTRAL = {  # the number that changes nothing as the second operand; the first two take it as the first one too
    _aten.add.Tensor: 0,
    _aten.add_.Tensor: 0,
    _aten.sub.Tensor: 0,
    _aten.sub_.Tensor: 0,
    _aten.mul.Tensor: 1,
    _aten.mul_.Tensor: 1,
    _aten.div.Tensor: 1,
    _aten.div_.Tensor: 1,
}


def drop_neutral_arithmetic(graph: Graph) -> None:
    """Removes additions of 0 and multiplications by 1, as in `sum(branches)`, which starts at 0. In place.

    torchao takes such an addition for the sum of two tensors, whose second operand it then does not find.
    """
    for node in list(graph.nodes):
        arguments: Any = node.args
        if node.op != "call_function" or node.target not in _NEUTRAL or node.kwargs or len(arguments) != 2:
            continue
        source, number = arguments
        if isinstance(number, Node) or number != _NEUTRAL[node.target]:
            continue
        before, after = (each.meta.get("val") for each in (source, node))
        if before is None or after is None or before.dtype != after.dtype or not _may_alias(source, node):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def drop_assertions(module: GraphModule) -> None:
    """Removes the assertions of dtype and device that export places before casts such as `x.float()`, in place.

    They hold for the exported example: not for training in bf16, and not for the converted copy on another device.
    """
    for part in module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.find_nodes(op="call_function", target=_aten._assert_tensor_metadata.default):
                part.graph.erase_node(node)
            part.recompile()


def _may_alias(source: Node, node: Node) -> bool:
    """Decides whether readers of `node`, a copy of `source`, may read `source` itself: nobody writes into the copy."""
    return source.users.keys() == {node} or not any(_aliases(reader) for reader in node.users)


def _aliases(node: Node) -> bool:
    """True where a node's operator writes into an input, or returns a view of one; or where it is not known."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(argument.alias_info is not None for argument in schema.arguments)


def refuse_other_blocks(module: GraphModule) -> None:
    """Raises QuantizationError for an enabled torch.autocast and for torch.cond and the like, by layer.

    The program of the int8 model could not hold them.
    """
    harmless = {node for node, _, _ in mode_blocks(module)}
    for node in _blocks(module):
        if node not in harmless:
            kind = str(getattr(node.target, "__name__", node.target))
            hint = "make forward free of branches and loops that depend on values: torch.where chooses between results"
            if "autocast" in kind:
                kind, hint = "torch.autocast", "leave autocast to `precision`"
            raise QuantizationError(f"{_block_place(module, node)}: {kind} in forward cannot be quantized", hint)


def _block_place(module: GraphModule, node: Node) -> str:
    """Returns the layer that a node with a subgraph is in; where the node does not say, a layer inside."""
    inside = [
        each
        for argument in node.all_input_nodes
        if argument.op == "get_attr" and isinstance(block := attrgetter(str(argument.target))(module), GraphModule)
        for each in block.graph.nodes
    ]
    return next((name for each in (node, *inside) if (name := module_of(each))), "the model itself")


def _blocks(module: GraphModule) -> Iterator[Node]:
    """Yields the nodes that call a subgraph."""
    for node in module.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        if isinstance(getattr(module.get_submodule(owner), name), nn.Module):
            yield from node.users


def hides_weights(module: GraphModule) -> bool:
    """Tells whether a block under torch.no_grad, into which quantizers do not look, has parameters of its own."""
    return any(
        node.target is torch.ops.higher_order.wrap_with_set_grad_enabled
        and (
            any(_is_parameter(module, each) for each in inputs)
            or next(module.get_submodule(str(block.target)).parameters(), None) is not None
        )
        for node, block, inputs in mode_blocks(module)
    )


def _is_parameter(module: GraphModule, node: Any) -> bool:
    if not isinstance(node, Node) or node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    return isinstance(getattr(module.get_submodule(owner), name), nn.Parameter)
