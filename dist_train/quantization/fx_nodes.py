"""Names of layers, weights and fake-quantize modules in FX graphs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import GraphModule, Node

from dist_train.errors import QuantizationError
from dist_train.quantization.fake_quantize import (
    ActivationFakeQuantize,
    WeightFakeQuantize,
)


def layer_of(node: Node) -> str:
    """Returns the path of a node's module, as in `named_modules()`; the node's own name where there is none."""
    return module_of(node) or node.name


def module_of(node: Node) -> str:
    """Returns the path of a node's module, as in `named_modules()`; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return path.removeprefix("L['self']").removeprefix("_export_root").removeprefix(".")


def _first_layer(quantizer: Node, modules: dict[str, nn.Module]) -> Node:
    """Returns the first user that is no fake quantization itself: two follow each other where widths differ."""
    user = next(iter(quantizer.users))
    while user.op == "call_module" and isinstance(modules.get(str(user.target)), ActivationFakeQuantize):
        user = next(iter(user.users))
    return user


def name_fake_quantizers(module: GraphModule) -> None:
    """Moves the fake-quantize modules to `quantizers.<layer>_<weight|input>`, each registered once.

    PT2E and FX name them activation_post_process_<n>, and a shared one several times: the state of a changed model
    would load silently.
    """
    found = dict(module.named_modules(remove_duplicate=False))
    quantizers, names = nn.Module(), dict[nn.Module, str]()
    for node in module.graph.nodes:
        quantizer = found.get(node.target) if node.op == "call_module" else None
        if not isinstance(quantizer, (ActivationFakeQuantize, WeightFakeQuantize)):
            continue
        if quantizer not in names:
            kind = "weight" if isinstance(quantizer, WeightFakeQuantize) else "input"
            user = _first_layer(node, found)
            name = f"{layer_of(user)}_{kind}".replace(".", "_")
            taken = sum(other == name or other.startswith(f"{name}_") for other in names.values())
            names[quantizer] = f"{name}_{taken}" if taken else name
            quantizers.add_module(names[quantizer], quantizer)
        node.target = f"quantizers.{names[quantizer]}"
    if hasattr(module, "quantizers"):
        raise QuantizationError(
            "the model has an attribute named `quantizers`, which preparing it needs", "rename it in the model"
        )
    module.add_module("quantizers", quantizers)
    for name, child in list(module._modules.items()):  # named_children() names a shared one once
        if isinstance(child, (ActivationFakeQuantize, WeightFakeQuantize)):
            delattr(module, name)
    module.recompile()


def quantized_weights(module: GraphModule) -> Iterator[str]:
    """Yields the parameters from which the inputs of weights' fake-quantize nodes are computed."""
    quantizers = {
        name for name, each in module.named_modules(remove_duplicate=False) if isinstance(each, WeightFakeQuantize)
    }
    waiting: list[Node] = [node for node in module.graph.find_nodes(op="call_module") if str(node.target) in quantizers]
    seen = set[Node]()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
            if node.op == "get_attr":
                yield str(node.target)
