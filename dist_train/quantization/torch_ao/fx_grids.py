"""Grids of the activations of torch.ao's traced model: all bits where kernels allow it, none where none is needed."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from dist_train.quantization.fake_quantize import ActivationFakeQuantize

_MOVES: tuple[Any, ...] = (
    *("flatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "transpose", "contiguous"),
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout),
)
_CLAMPS: tuple[Any, ...] = (
    *(nn.ReLU, torch.relu, F.relu, "relu", "relu_", nn.ReLU6, F.relu6),
    *(nn.Hardtanh, F.hardtanh),
)
_GRIDLESS = (*_MOVES, *_CLAMPS)  # their kernels keep the grid of their input
# Kernels without sums of products, which could overflow. Their outputs have a grid of their own.
_PAIRWISE: tuple[Any, ...] = (
    operator.add,
    operator.iadd,
    torch.add,
    "add",
    "add_",
    operator.mul,
    torch.mul,
    "mul",
    torch.cat,
)
_ELEMENTWISE: tuple[Any, ...] = (
    *(nn.Hardswish, F.hardswish, nn.Hardsigmoid, F.hardsigmoid),
    *(nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", nn.LeakyReLU, F.leaky_relu, nn.ELU, F.elu),
)


def float_results(prepared: GraphModule) -> None:
    """Removes the fake quantization of each Linear's output that is an output of the model, in place.

    There may be operations in between that only move numbers, such as a reshape.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    places = {place for group in _places(prepared, modules) for place in group}
    for output in prepared.graph.output_node().all_input_nodes:
        chain = [output]
        while chain[-1] in places or _kind(chain[-1], modules) in _MOVES:
            chain.append(chain[-1].all_input_nodes[0])
        if _kind(chain[-1], modules) is not torch.ao.nn.qat.Linear or any(len(node.users) > 1 for node in chain):
            continue
        for place in [node for node in chain if node in places]:
            place.replace_all_uses_with(place.all_input_nodes[0])
            prepared.graph.erase_node(place)
    prepared.recompile()


def saturating_clamps(prepared: GraphModule) -> None:
    """Removes the fake quantization between a layer and its ReLU or ReLU6, in place; `clamp_integers` adds another one.

    torch.ao gives both sides of a ReLU6 the grid of its input: 2 of 7 bits may then be spent on numbers that the ReLU6
    cuts off. On the grid of its output, saturating integers are the clamp. A layer that is called several times is left
    alone: its converted module has one grid for all its outputs.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    places = [place for group in _places(prepared, modules) for place in group]
    calls = _calls(prepared, modules)
    for place in places:
        source, readers = place.all_input_nodes[0], list(place.users)
        layer = modules.get(_target(source))
        if (
            hasattr(layer, "weight_fake_quant")
            and calls[layer] == len(source.users) == len(readers) == 1
            and _kind(readers[0], modules) in _CLAMPS
            and set(readers[0].users) <= set(places)
        ):
            place.replace_all_uses_with(source)
            prepared.graph.erase_node(place)
    prepared.recompile()


def clamp_integers(prepared: GraphModule) -> None:
    """Quantizes a layer's outputs before its clamp too, on the clamp's grid, in place. Called before conversion."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    places = [place for group in _places(prepared, modules) for place in group]
    for place in places:
        clamp = place.all_input_nodes[0]
        source = clamp.all_input_nodes[0] if clamp.all_input_nodes else clamp
        if _kind(clamp, modules) in _CLAMPS and hasattr(modules.get(_target(source)), "weight_fake_quant"):
            with prepared.graph.inserting_before(clamp):
                clamp.replace_input_with(source, prepared.graph.call_module(_target(place), (source,)))
    prepared.recompile()


def all_bits(prepared: GraphModule) -> None:
    """Gives all bits to activations that no integer product reads, in place; see ActivationFakeQuantize's `range_max`.

    Activations of a module that is called several times are left alone: a product may read its other outputs.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    calls = _calls(prepared, modules)
    for places in _places(prepared, modules):
        sources = {place.all_input_nodes[0] for place in places}
        readers = [reader for place in places for reader in place.users]
        if any(calls[modules.get(_target(node))] > 1 and _kind(node, modules) not in _GRIDLESS for node in sources):
            continue
        if all(
            reader in sources or _adds_up_nothing(reader, modules) or _in_float(reader, prepared) for reader in readers
        ):
            quantizer = modules[_target(places[0])]
            assert isinstance(quantizer, ActivationFakeQuantize)
            quantizer.range_max = quantizer.quant_max


def trained_heads(prepared: GraphModule) -> set[str]:
    """Returns the names of the Linears of `float_results`.

    To be called after `clamp_integers`: before it, a clamped layer has no fake quantization behind it either.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    places = {place for group in _places(prepared, modules) for place in group}
    return {
        _target(node)
        for node in prepared.graph.find_nodes(op="call_module")
        if _kind(node, modules) is torch.ao.nn.qat.Linear and places.isdisjoint(node.users)
    }


def _places(prepared: GraphModule, modules: Mapping[str, nn.Module]) -> Collection[list[Node]]:
    """Groups the nodes that call each activation's fake quantization: several with only moves of numbers in between."""
    found = dict[nn.Module, list[Node]]()
    for node in prepared.graph.find_nodes(op="call_module"):
        module = modules[node.target]
        if isinstance(module, ActivationFakeQuantize):
            found.setdefault(module, []).append(node)
    return found.values()


def _calls(prepared: GraphModule, modules: Mapping[str, nn.Module]) -> Counter[nn.Module | None]:
    """Counts the nodes that call each module."""
    return Counter(modules[_target(node)] for node in prepared.graph.find_nodes(op="call_module"))


def _target(node: Node) -> str:
    return str(node.target)


def _kind(node: Node, modules: Mapping[str, nn.Module]) -> Any:
    """Returns the module's type, or the function or method; None for a node that calls nothing.

    An input's target is its name, which may be that of a method.
    """
    if node.op == "call_module":
        return type(modules[_target(node)])
    return node.target if node.op.startswith("call_") else None


def _adds_up_nothing(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for a kernel without sums of products and with a grid of its own, which adding a number does not have."""
    kind = _kind(node, modules)
    return kind in (*_ELEMENTWISE, *_CLAMPS) or (kind in _PAIRWISE and len(node.all_input_nodes) > 1)


def _in_float(node: Node, prepared: GraphModule) -> bool:
    """True where the converted model computes the node in floating point, from dequantized inputs."""
    qconfigs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    return node.op == "output" or qconfigs.get(node.name, node) is None
