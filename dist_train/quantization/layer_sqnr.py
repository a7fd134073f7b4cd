"""How faithful each layer of an integer model is: its signal-to-quantization-noise ratio against fake quantization."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FixedQParamsFakeQuantize
from torch.fx import GraphModule, Interpreter, Node

from dist_train.programs.torchscript import integer_kernels
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.fx_nodes import layer_of
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.graph_rewrite import folded_batch_norms
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from dist_train.quantization.torch_ao.float_output import FloatOutputLinear
from dist_train.quantization.torch_ao.fx_grids import clamp_integers
from dist_train.quantization.torch_ao.integer_model import IntegerModel
from dist_train.quantization.torch_ao.prepared_modules import PreparedModules

_FAKE_QUANTIZERS = (ActivationFakeQuantize, FixedQParamsFakeQuantize)


@torch.no_grad()
def layer_noise(prepared: PreparedModel, converted: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of each layer of the integer model, in dB, the worst layer first.

    Every layer is given what the fake-quantized model computed up to it, so that a wrong layer does not spoil those behind it.
    The ratio is 10 log10(sum(y^2) / sum((y - y_int8)^2)), with y the fake-quantized layer's output: infinite where they are
    equal, NaN, which comes first, where the integer layer's is not finite.

    prepared: with known ranges. converted: what its backend's `convert` made of it. Neither is changed.
    inputs: float32 [B, ...], real data.

    Returns an empty dict for models of other kinds than the built-in backends make.
    """
    reference = copy.deepcopy(prepared).cpu().eval()
    reference.observe(False)
    if isinstance(reference, PreparedGraph) and isinstance(converted, GraphModule):
        found = _of_graph(reference, converted, inputs)
    elif isinstance(reference, PreparedModules) and isinstance(converted, IntegerModel):
        model, integers = reference.model, converted.model
        with integer_kernels(converted.engine):
            if isinstance(model, GraphModule) and isinstance(integers, GraphModule):
                found = _of_traced(model, integers, inputs)
            else:
                found = _of_modules(model, integers, inputs)
    else:
        found = {}
    return dict(sorted(found.items(), key=lambda each: -math.inf if math.isnan(each[1]) else each[1]))


def noise_table(layers: Mapping[str, float], most: int = 12) -> str:
    """A line a layer, in the order given: its name and its ratio in dB."""
    shown = list(layers.items())[:most]
    width = max((len(name) for name, _ in shown), default=0)
    words = ((name, in_words(ratio)) for name, ratio in shown)
    lines = [f"  {name:<{width}}  {ratio if isinstance(ratio, str) else f'{ratio:.1f} dB'}" for name, ratio in words]
    if len(layers) > most:
        lines.append(f"  and {len(layers) - most} more")
    return "\n".join(lines)


def in_words(ratio: float) -> float | str:
    """The ratio in dB for JSON, which has neither infinity nor NaN: "equal", "not finite", and "no signal" where all should be 0."""
    if math.isfinite(ratio):
        return ratio
    return "not finite" if math.isnan(ratio) else "equal" if ratio > 0 else "no signal"


def _ratio(right: Tensor, actual: Tensor) -> float:
    """In dB, of one call of a layer."""
    signal, noise = right.double().square().sum(), (right.double() - actual.double()).square().sum()
    if not bool(torch.isfinite(noise)):
        return math.nan
    return float(10 * torch.log10(signal / noise)) if noise > 0 else math.inf


def _worse(left: float, right: float) -> float:
    return left if math.isnan(left) else right if math.isnan(right) else min(left, right)


@dataclass(frozen=True)
class _Answer:
    """What a layer of the fake-quantized model gave; and scale and zero point of the grid that it lies on, where integers do too."""

    output: Tensor
    grid: tuple[float, int] | None = None

    def on_grid(self, like: Tensor) -> Tensor:
        """On the reference's own grid: a wrong scale of this integer layer is then not the next one's fault. In memory as `like`."""
        last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
        output = self.output.clone(memory_format=torch.channels_last if last else torch.preserve_format)
        return output if self.grid is None else torch.quantize_per_tensor(output, *self.grid, like.dtype)


def _grid(quantizer: nn.Module) -> tuple[float, int]:
    return float(quantizer.get_buffer("scale")), int(quantizer.get_buffer("zero_point"))


class _Recorder(Interpreter):
    """Runs a graph and keeps the outputs of some of its nodes, under the names that `wanted` gives for theirs."""

    def __init__(self, module: GraphModule, wanted: Mapping[str, str]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self.answers: dict[str, _Answer] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.name in self._wanted and isinstance(result, Tensor) and result.is_floating_point():
            quantizer = self.submodules.get(str(node.target)) if node.op == "call_module" else None
            grid = _grid(quantizer) if isinstance(quantizer, _FAKE_QUANTIZERS) else None
            self.answers[self._wanted[node.name]] = _Answer(result.clone(), grid)  # the next operator may work in place
        return result


class _Corrected(Interpreter):
    """Runs the integer graph, compares the outputs of what computes with integers, and goes on with the right ones."""

    def __init__(self, module: GraphModule, right: Mapping[str, _Answer]) -> None:
        super().__init__(module)
        self._right = right
        self.ratios: dict[str, float] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        right = self._right.get(node.name)
        if right is None or (right.grid is not None and not result.is_quantized):
            return result
        if result.is_quantized or any("dequantize" in str(source.target) for source in node.all_input_nodes):
            layer = str(node.target) if node.op == "call_module" else layer_of(node)
            layer = layer.removesuffix(".activation_post_process")  # what a FloatFunctional holds
            actual = result.dequantize() if result.is_quantized else result
            self.ratios[layer] = _worse(self.ratios.get(layer, math.inf), _ratio(right.output, actual))
        return right.on_grid(result)


def _of_graph(prepared: PreparedGraph, converted: GraphModule, inputs: Tensor) -> dict[str, float]:
    """Nodes keep their names in conversion. Of a folded batch norm the convolution stays, and gives what the batch norm gave."""
    module = prepared.graph_module()
    kept = {node.name: node.target for node in converted.graph.nodes if node.op == "call_function"}
    wanted = {node.name: node.name for node in module.graph.nodes if kept.get(node.name) is node.target}
    for folded in folded_batch_norms(module.graph):
        del wanted[folded.convolution.name]
        wanted[folded.batch_norm.name] = folded.convolution.name
    return _compare(module, wanted, converted, inputs)


def _of_traced(prepared: GraphModule, converted: GraphModule, inputs: Tensor) -> dict[str, float]:
    """What a node gives is fake-quantized by the node after it, and lies on that one's grid."""
    clamp_integers(prepared)
    modules = dict(prepared.named_modules(remove_duplicate=False))
    wanted = {
        user.name: node.name
        for node in prepared.graph.nodes
        for user in node.users
        if user.op == "call_module" and isinstance(modules[str(user.target)], _FAKE_QUANTIZERS)
    }
    # But for a head's, which stays in floating point.
    heads = _heads(converted)
    wanted |= {node.name: node.name for node in prepared.graph.find_nodes(op="call_module") if node.target in heads}
    return _compare(prepared, wanted, converted, inputs)


def _heads(converted: nn.Module) -> set[str]:
    return {name for name, module in converted.named_modules() if isinstance(module, FloatOutputLinear)}


def _compare(
    prepared: GraphModule, wanted: Mapping[str, str], converted: GraphModule, inputs: Tensor
) -> dict[str, float]:
    recorder = _Recorder(prepared, wanted)
    recorder.run(inputs)
    corrected = _Corrected(converted, recorder.answers)
    corrected.run(inputs)
    return corrected.ratios


def _of_modules(prepared: nn.Module, converted: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Eager mode: modules keep their names, and hold their fake quantization; heads and those that give integers are compared."""
    answers, ratios = defaultdict[str, list[_Answer]](list), dict[str, float]()

    def keep(name: str, quantizer: nn.Module | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            answers[name].append(_Answer(output.clone(), None if quantizer is None else _grid(quantizer)))

        return hook

    def compare(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.is_quantized and name not in heads:
                return output
            right = answers[name].pop(0)  # a module may be called several times
            ratios[name] = _worse(ratios.get(name, math.inf), _ratio(right.output, output.dequantize()))
            return right.on_grid(output)

        return hook

    heads = _heads(converted)
    for name, module in prepared.named_modules():
        quantizer = getattr(module, "activation_post_process", None)
        if isinstance(quantizer, _FAKE_QUANTIZERS):
            module.register_forward_hook(keep(name, quantizer))
        elif name in heads:
            module.register_forward_hook(keep(name, None))
    prepared(inputs)
    hooks = [
        module.register_forward_hook(compare(name)) for name, module in converted.named_modules() if name in answers
    ]
    try:
        converted(inputs)
    finally:
        for each in hooks:
            each.remove()
    return ratios
