"""Blocks of an exported graph under torch.no_grad or torch.autocast, which a program for inference does not need."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled  # (enabled, block, *inputs)
AUTOCAST = torch.ops.higher_order.wrap_with_autocast  # (device type, dtype, enabled, cache enabled, block, *inputs)


def mode_blocks(module: GraphModule) -> Iterator[tuple[Node, Node, tuple[Any, ...]]]:
    """Yields the nodes that run a block where modes do not matter to inference, with the block and its inputs.

    These are blocks under torch.no_grad, torch.enable_grad and a disabled torch.autocast.
    """
    for node in list(module.graph.nodes):
        arguments: Any = node.args
        if node.op == "call_function" and node.target is _NO_GRAD:
            yield node, arguments[1], arguments[2:]
        elif node.op == "call_function" and node.target is AUTOCAST and not arguments[2]:
            yield node, arguments[4], arguments[5:]


def inline_modes(module: GraphModule, kind: Any = None) -> None:
    """Replaces the blocks of `mode_blocks` by their contents, in place.

    kind: operator of the blocks that are replaced; None: all.
    """
    for node, block, inputs in mode_blocks(module):  # lazily: inputs change as blocks before are replaced
        if kind not in (None, node.target):
            continue
        inner = module.get_submodule(str(block.target))
        assert isinstance(inner, GraphModule)
        inline_modes(inner, kind)
        values: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
        with module.graph.inserting_before(node):
            outputs: Any = module.graph.graph_copy(inner.graph, values)
        for original in inner.graph.find_nodes(op="get_attr"):
            values[original].target = f"{block.target}.{original.target}"
        for user in list(node.users):
            assert user.target is operator.getitem, f"{user} reads all outputs of {node}"
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not block.users:
            module.graph.erase_node(block)
    module.graph.lint()
    module.recompile()
