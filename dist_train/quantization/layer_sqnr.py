"""Signal-to-quantization-noise ratio (SQNR) of each layer of an integer model, against its fake-quantized layer."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from dist_train import trees
from dist_train.quantization.fx_nodes import layer_of
from dist_train.quantization.prepared import PreparedModel
from dist_train.trees import Tree

Kinds = tuple[type[nn.Module], ...]  # of fake-quantize modules with the buffers `scale` and `zero_point`


@torch.no_grad()
def layer_sqnr(prepared: PreparedModel, converted: nn.Module, inputs: Tree) -> dict[str, float]:
    """Measures the SQNR of each layer of the integer model, in dB, the worst layer first.

    Every layer gets the inputs that the fake-quantized model computed for it, so that a wrong layer does not spoil the
    layers behind it. The ratio is 10 log10(sum(y^2) / sum((y - y_int8)^2)), where y is the output of the fake-quantized
    layer. It is infinite where the outputs are equal. It is NaN, which comes first, where the integer layer's output is
    not finite.

    Args:
        prepared: with known ranges; not changed.
        converted: the backend's `convert` of `prepared`; not changed.
        inputs: [B, ...], real data.

    Returns:
        Ratio by layer; empty for a backend that does not tell, see `PreparedModel.layer_sqnr`.
    """
    reference = copy.deepcopy(prepared).cpu().eval()
    reference.observe(False)
    found = reference.layer_sqnr(converted, inputs)
    return dict(sorted(found.items(), key=lambda each: -math.inf if math.isnan(each[1]) else each[1]))


def sqnr_table(layers: Mapping[str, float], most: int = 12) -> str:
    """Formats a line for each layer, in the order given: its name and its ratio in dB."""
    shown = list(layers.items())[:most]
    width = max((len(name) for name, _ in shown), default=0)
    words = ((name, sqnr_as_json(ratio)) for name, ratio in shown)
    lines = [f"  {name:<{width}}  {ratio if isinstance(ratio, str) else f'{ratio:.1f} dB'}" for name, ratio in words]
    if len(layers) > most:
        lines.append(f"  and {len(layers) - most} more")
    return "\n".join(lines)


def sqnr_as_json(ratio: float) -> float | str:
    """Returns the ratio in dB for JSON, which has neither infinity nor NaN.

    "equal" stands for infinity, "no signal" for minus infinity (all outputs should be 0), "not finite" for NaN.
    """
    if math.isfinite(ratio):
        return ratio
    return "not finite" if math.isnan(ratio) else "equal" if ratio > 0 else "no signal"


def _ratio(right: Tensor, actual: Tensor) -> float:
    """Computes the SQNR of one call of a layer, in dB."""
    signal, noise = right.double().square().sum(), (right.double() - actual.double()).square().sum()
    if not bool(torch.isfinite(noise)):
        return math.nan
    return float(10 * torch.log10(signal / noise)) if noise > 0 else math.inf


def _worse(left: float, right: float) -> float:
    return left if math.isnan(left) else right if math.isnan(right) else min(left, right)


@dataclass(frozen=True)
class _Output:
    """Output of a fake-quantized layer.

    Attributes:
        values: float32, any shape.
        grid: scale and zero point of its fake quantization, where the integer layer's output is quantized too.
    """

    values: Tensor
    grid: tuple[float, int] | None = None

    def on_grid(self, like: Tensor) -> Tensor:
        """Returns the input of the next integer layer, in the memory format and dtype of `like`.

        It has the reference's grid, so that a wrong scale of this integer layer does not count for the next one.
        """
        last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
        values = self.values.clone(memory_format=torch.channels_last if last else torch.preserve_format)
        return values if self.grid is None else torch.quantize_per_tensor(values, *self.grid, like.dtype)


def _grid(quantizer: nn.Module) -> tuple[float, int]:
    return float(quantizer.get_buffer("scale")), int(quantizer.get_buffer("zero_point"))


class _Recorder(Interpreter):
    """Runs a graph and keeps the outputs of the nodes in `wanted`, under the names that it maps to."""

    def __init__(self, module: GraphModule, wanted: Mapping[str, str], kinds: Kinds) -> None:
        super().__init__(module)
        self._wanted, self._kinds = wanted, kinds
        self.outputs: dict[str, _Output] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.name in self._wanted and isinstance(result, Tensor) and result.is_floating_point():
            quantizer = self.submodules.get(str(node.target)) if node.op == "call_module" else None
            grid = _grid(quantizer) if isinstance(quantizer, self._kinds) else None
            self.outputs[self._wanted[node.name]] = _Output(result.clone(), grid)  # the next operator may work in place
        return result


class _Corrected(Interpreter):
    """Runs the integer graph, compares the outputs of its integer layers, and goes on with the expected outputs."""

    def __init__(self, module: GraphModule, expected: Mapping[str, _Output]) -> None:
        super().__init__(module)
        self._expected = expected
        self.ratios: dict[str, float] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        right = self._expected.get(node.name)
        if right is None or (right.grid is not None and not result.is_quantized):
            return result
        if result.is_quantized or any("dequantize" in str(source.target) for source in node.all_input_nodes):
            layer = str(node.target) if node.op == "call_module" else layer_of(node)
            layer = layer.removesuffix(".activation_post_process")  # a child of FloatFunctional
            actual = result.dequantize() if result.is_quantized else result
            self.ratios[layer] = _worse(self.ratios.get(layer, math.inf), _ratio(right.values, actual))
        return right.on_grid(result)


def compare_graphs(
    prepared: GraphModule, wanted: Mapping[str, str], converted: GraphModule, inputs: Sequence[Tensor], kinds: Kinds
) -> dict[str, float]:
    """Compares two graphs, see `layer_sqnr`.

    Args:
        prepared: the fake-quantized graph.
        wanted: from the names of its nodes whose outputs are compared to the names of the nodes in `converted`.
        inputs: leaves, in the order of the graphs' inputs.
        kinds: classes of the fake-quantize modules.
    """
    recorder = _Recorder(prepared, wanted, kinds)
    recorder.run(*inputs, enable_io_processing=False)
    corrected = _Corrected(converted, recorder.outputs)
    corrected.run(*inputs, enable_io_processing=False)
    return corrected.ratios


def compare_modules(
    prepared: nn.Module, converted: nn.Module, heads: Collection[str], inputs: Tree, kinds: Kinds
) -> dict[str, float]:
    """Compares two models whose modules have the same names, see `layer_sqnr`.

    Modules with integer outputs are compared, and heads.

    Args:
        prepared: the fake-quantized model, whose modules hold their own fake quantization. Its hooks are changed.
        heads: names of the modules with floating-point outputs.
        kinds: classes of the fake-quantize modules.
    """
    expected, ratios = defaultdict[str, list[_Output]](list), dict[str, float]()

    def keep(name: str, quantizer: nn.Module | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            expected[name].append(_Output(output.clone(), None if quantizer is None else _grid(quantizer)))

        return hook

    def compare(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.is_quantized and name not in heads:
                return output
            right = expected[name].pop(0)  # a module may be called several times
            ratios[name] = _worse(ratios.get(name, math.inf), _ratio(right.values, output.dequantize()))
            return right.on_grid(output)

        return hook

    for name, module in prepared.named_modules():
        quantizer = getattr(module, "activation_post_process", None)
        if isinstance(quantizer, kinds):
            module.register_forward_hook(keep(name, quantizer))
        elif name in heads:
            module.register_forward_hook(keep(name, None))
    trees.call(prepared, inputs)
    hooks = [
        module.register_forward_hook(compare(name)) for name, module in converted.named_modules() if name in expected
    ]
    try:
        trees.call(converted, inputs)
    finally:
        for each in hooks:
            each.remove()
    return ratios
