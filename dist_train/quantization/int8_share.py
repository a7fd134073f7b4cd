"""How much of a model became int8: "int8" may mean mostly float, which no gate of decisions shows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from dist_train.quantization.fake_quantize import WeightFakeQuantize
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from dist_train.quantization.torch_ao.prepared_modules import PreparedModules

LEAST_SHARE = 0.9
"""Of the weights, below which a model that is called int8 is warned of: small and fast is then true of less than it says."""
_SHOWN = 3


@dataclass(frozen=True)
class Coverage:
    """The weights of a model: every parameter of two or more dimensions, an element of a shared one counted once.

    Biases and the vectors of normalisations, which have one dimension, stay in floating point or go into the integers of a layer,
    and are few. What else has two dimensions, such as position embeddings, counts: it is in the file as int8 or as float.

    Attributes:
        int8: elements that are converted to integers, of 8 bits or of those that a rule asks for, by the module that holds them.
        left_float: elements that stay in floating point, the module with the most first.
    """

    int8: Mapping[str, int]
    left_float: Mapping[str, int]

    @property
    def share(self) -> float:
        """Of all elements the share that is int8; 1 for a model without weights."""
        whole = sum(self.int8.values()) + sum(self.left_float.values())
        return sum(self.int8.values()) / whole if whole else 1.0

    def as_json(self) -> dict[str, Any]:
        """For results.json and the manifest; modules by name, those in floating point with their elements."""
        return {
            "share": round(self.share, 6),
            "int8": sum(self.int8.values()),
            "float": sum(self.left_float.values()),
            "int8_modules": len(self.int8),
            "float_modules": dict(self.left_float),
        }

    def in_words(self) -> str:
        """`83.1 % of the weights are int8; float: encoder.0 (1,024), head (512) and 3 more`."""
        names = [f"{name} ({count:,})" for name, count in list(self.left_float.items())[:_SHOWN]]
        more = len(self.left_float) - len(names)
        left = f"; float: {', '.join(names)}{f' and {more} more' if more else ''}" if names else ""
        return f"{in_percent(self.share)} % of the weights are int8{left}"


def in_percent(share: float) -> str:
    """Rounded down, so that 100 is all."""
    return f"{math.floor(share * 1000) / 10:g}"


def coverage(model: nn.Module, prepared: PreparedModel) -> Coverage | None:
    """Which weights of the float `model` the conversion of `prepared`, which a backend made of it, turns into integers.

    These are those that a weight's fake quantization reads: convert makes integers of what is simulated, or raises. None for a prepared
    model that no built-in backend made.
    """
    if not isinstance(prepared, (PreparedGraph, PreparedModules)):
        return None
    simulated = set(_simulated(prepared))
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            names[id(parameter)].append(name)
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    int8, left = defaultdict[str, int](int), defaultdict[str, int](int)
    for key, shared in names.items():
        found = next((name for name in shared if name in simulated), None)
        name = found or shared[0]
        (left if found is None else int8)[name.rpartition(".")[0] or name] += sizes[key]
    return Coverage(dict(int8), dict(sorted(left.items(), key=lambda each: -each[1])))


def _simulated(prepared: PreparedGraph | PreparedModules) -> Iterator[str]:
    """The float model's names of the parameters that are fake-quantized as weights."""
    if isinstance(prepared, PreparedGraph):
        yield from _read_by_quantizers(prepared.graph_module())
        return
    for name, module in prepared.model.named_modules():
        if isinstance(getattr(module, "weight_fake_quant", None), WeightFakeQuantize):
            yield f"{name}.weight"
    if isinstance(prepared.model, GraphModule):
        yield from _read_by_quantizers(prepared.model)


def _read_by_quantizers(module: GraphModule) -> Iterator[str]:
    """The attributes that the inputs of weights' fake-quantize nodes are computed from, through a folded batch norm's factors."""
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
