"""Weights that forward computes from parameters, as weight standardization does: in floats, and folded for conversion.

torch.ao takes their arithmetic for that of activations, and cannot run it when it packs the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FixedQParamsFakeQuantize
from torch.fx import Graph, GraphModule, Interpreter, Node

from dist_train.quantization.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize

_ACTIVATIONS = (ActivationFakeQuantize, FixedQParamsFakeQuantize)
_WITH_BIAS = (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d, F.linear)


def computed_from_parameters(graph: Graph) -> list[Node]:
    """Returns the nodes that read parameters and buffers only, in graph order."""
    found = dict[Node, None]()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op.startswith("call_") and inputs and all(each in found for each in inputs)):
            found[node] = None
    return list(found)


def keep_computed_weights(prepared: GraphModule) -> None:
    """Removes the fake quantization inside what parameters alone determine, in place; that of a weight itself stays.

    So does that of a parameter which is added to data, for example.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    fixed = dict.fromkeys(computed_from_parameters(prepared.graph))
    for node in reversed(list(fixed)):
        if isinstance(_module(node, modules), _ACTIVATIONS):
            for user in list(node.users):
                if user in fixed or _is_bias(node, user):
                    user.replace_input_with(node, node.all_input_nodes[0])
            if not node.users:
                prepared.graph.erase_node(node)
    prepared.recompile()


@torch.no_grad()
def fold_computed_weights(prepared: GraphModule) -> None:
    """Computes what parameters alone determine and stores it as a buffer, in place. Called before conversion."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    kinds = (*_ACTIVATIONS, WeightFakeQuantize)
    fixed = dict.fromkeys(computed_from_parameters(prepared.graph))
    for node in list(fixed):  # not what a fake-quantized parameter is computed into: torch.ao has to convert that
        if isinstance(_module(node, modules), kinds) or any(each not in fixed for each in node.all_input_nodes):
            del fixed[node]
    read = [node for node in fixed if node.op != "get_attr" and any(user not in fixed for user in node.users)]
    if not read:
        return
    interpreter = Interpreter(prepared)
    for node in fixed:
        interpreter.env[node] = interpreter.run_node(node)
    for node in _tensors(read, interpreter):
        name = f"_computed_{node.name}"
        prepared.register_buffer(name, interpreter.env[node].detach().clone())
        with prepared.graph.inserting_before(node):
            folded = prepared.graph.get_attr(name)
        for user in [user for user in node.users if user not in fixed]:
            user.replace_input_with(node, folded)
    for node in reversed(list(fixed)):
        if not node.users:
            prepared.graph.erase_node(node)
    prepared.recompile()


def _tensors(nodes: list[Node], interpreter: Interpreter) -> Iterator[Node]:
    return (node for node in nodes if isinstance(interpreter.env[node], Tensor))


def _module(node: Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _is_bias(node: Node, user: Node) -> bool:
    return user.target in _WITH_BIAS and (user.args[2:3] == (node,) or user.kwargs.get("bias") is node)
