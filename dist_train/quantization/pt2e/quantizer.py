"""Placement of fake quantization by pt2e: X86InductorQuantizer's places, changed by the config's rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dist_train.config.stages import ActivationQuantizationConfig, RuleConfig, WeightQuantizationConfig
from dist_train.errors import QuantizationError
from dist_train.quantization.fake_quantize import (
    ActivationFakeQuantize,
    NarrowActivationFakeQuantize,
    TransposedWeightFakeQuantize,
    WeightFakeQuantize,
)
from dist_train.quantization.fx_nodes import module_of
from dist_train.quantization.pt2e.more_layers import annotate_more
from dist_train.quantization.pt2e.torchao_parts import (
    QuantizationAnnotation,
    QuantizationSpec,
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from dist_train.quantization.rules import idle_skip, shown

_WEIGHT_SCHEMES = {
    ("symmetric", "channel"): torch.per_channel_symmetric,
    ("symmetric", "tensor"): torch.per_tensor_symmetric,
    ("affine", "channel"): torch.per_channel_affine,
    ("affine", "tensor"): torch.per_tensor_affine,
}
_ACTIVATION_SCHEMES = {"affine": torch.per_tensor_affine, "symmetric": torch.per_tensor_symmetric}
_WEIGHTS = (WeightFakeQuantize, TransposedWeightFakeQuantize)
_ACTIVATIONS = (ActivationFakeQuantize, NarrowActivationFakeQuantize)
AVERAGES = (torch.ops.aten.avg_pool2d.default, torch.ops.aten.adaptive_avg_pool2d.default)
_Places = dict[Node, tuple[frozenset[Node], bool]]  # by node: its quantized inputs, and whether its output is quantized


class RuleQuantizer(X86InductorQuantizer):
    """X86InductorQuantizer with our fake quantization (uint8 activations, int8 weights per channel) and with rules."""

    def __init__(self, rules: Mapping[str, RuleConfig], narrow: bool = False) -> None:
        """
        Args:
            rules: from `resolve_rules`.
            narrow: keep activations of 8 bits to 127 steps.
        """
        super().__init__()
        self._rules = rules
        default = get_default_x86_inductor_quantization_config(is_qat=True)
        simulation = NarrowActivationFakeQuantize if narrow else ActivationFakeQuantize
        activation = dataclasses.replace(default.input_activation, observer_or_fake_quant_ctr=simulation)
        weight = dataclasses.replace(default.weight, observer_or_fake_quant_ctr=WeightFakeQuantize)
        self.set_global(
            dataclasses.replace(default, input_activation=activation, output_activation=activation, weight=weight)
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Marks the nodes whose inputs or outputs are quantized.

        Raises:
            QuantizationError: a rule for weights or activations matches nothing that is quantized, or a rule that skips
                changes nothing.
        """
        skips = {id(rule): rule for rule in self._rules.values() if rule.skip}.values()
        without = [(rule, self._places_without(model, rule)) for rule in skips]
        self._annotate(model)
        for rule, places in without:
            if places == _places(model) and not self._holds_weights(model, rule):
                raise idle_skip(rule)
        self._apply_rules(model)
        return model

    def _annotate(self, model: GraphModule) -> None:
        self._annotate_with_config(model, None, self._stay_float)
        super().annotate(model)
        config = self.global_config
        annotate_more(model, config.input_activation, config.weight, self._stay_float)
        # A skipped convolution has an empty annotation, on which torchao 0.18's fusion of conv and batch norm fails
        # (IndexError).
        for node in model.graph.nodes:
            annotation = _annotation(node)
            if annotation is not None and not annotation.input_qspec_map and annotation.output_qspec is None:
                del node.meta["quantization_annotation"]
            elif annotation is not None and _averages(node) and annotation.output_qspec is not None:
                annotation.output_qspec = annotation.input_qspec_map[node.all_input_nodes[0]]

    def _places_without(self, model: GraphModule, rule: RuleConfig) -> _Places:
        """Returns the places that would be quantized without `rule`."""
        rules, self._rules = self._rules, {name: each for name, each in self._rules.items() if each is not rule}
        self._annotate(model)
        places, self._rules = _places(model), rules
        for node in model.graph.nodes:
            node.meta.pop("quantization_annotation", None)
        return places

    def _holds_weights(self, model: GraphModule, rule: RuleConfig) -> bool:
        """True where a skipped module has weights that nothing quantizes: the rule is fulfilled, if not needed."""
        return any(
            self._rule(node) is rule and _annotation(node) is None and source.op == "get_attr" and _is_weight(source)
            for node in model.graph.nodes
            for source in node.all_input_nodes
        )

    def _rule(self, node: Node) -> RuleConfig | None:
        return self._rules.get(module_of(node))

    def _stay_float(self, nodes: list[Node]) -> bool:
        """True where all nodes of a pattern belong to skipped modules."""
        rules = [self._rule(node) for node in nodes]
        return all(rule is not None and rule.skip for rule in rules)

    def _apply_rules(self, model: GraphModule) -> None:
        applied: list[RuleConfig] = []
        for node in model.graph.nodes:
            annotation, rule = _annotation(node), self._rule(node)
            if annotation is None or rule is None:
                continue
            for source, spec in annotation.input_qspec_map.items():
                if not isinstance(spec, QuantizationSpec):
                    continue  # shared with another place
                if spec.observer_or_fake_quant_ctr in _WEIGHTS and rule.weight is not None:
                    annotation.input_qspec_map[source] = _weight_spec(spec, rule.weight)
                    applied.append(rule)
                elif spec.observer_or_fake_quant_ctr in _ACTIVATIONS and rule.activation is not None:
                    annotation.input_qspec_map[source] = _activation_spec(spec, rule.activation)
                    applied.append(rule)
        for rule in self._rules.values():
            if not rule.skip and all(rule is not each for each in applied):
                raise QuantizationError(
                    f"the quantization rule {shown(rule)} changes nothing: "
                    "what it is the first to match is not quantized",
                    "match a convolution or a Linear, or remove the rule",
                )
        for node in model.graph.nodes:
            _quantize_once(node)


def _places(model: GraphModule) -> _Places:
    found = {node: _annotation(node) for node in model.graph.nodes}
    return {
        node: (frozenset(annotation.input_qspec_map), annotation.output_qspec is not None)
        for node, annotation in found.items()
        if annotation is not None
    }


def _averages(node: Node) -> bool:
    """True for a pool whose averages get a range of their own.

    X86InductorQuantizer puts averages on the grid of their inputs. There an average may fall in the middle
    between two integers, as a quarter of all means of 2 x 2 do. The last bit of a runtime then decides the rounding.
    That grid is also coarse: averages take up a small part of its range. A map of one pixel has nothing to average, and
    stays exact.
    """
    if node.op != "call_function" or node.target not in AVERAGES:
        return False
    before, after = (each.meta["val"].shape for each in (node.all_input_nodes[0], node))
    return bool(before != after or node.target is torch.ops.aten.avg_pool2d.default)


def _is_weight(node: Node) -> bool:
    return "val" in node.meta and node.meta["val"].dim() > 1


def _annotation(node: Node) -> QuantizationAnnotation | None:
    return node.meta.get("quantization_annotation")


def _quantize_once(node: Node) -> None:
    """Gives an output the specification of its readers where all have the same one; else it would be rounded twice."""
    annotation = _annotation(node)
    if annotation is None or not isinstance(annotation.output_qspec, QuantizationSpec):
        return
    wanted = list(_wanted_by_readers(node))
    if wanted and all(spec == wanted[0] for spec in wanted) and isinstance(wanted[0], QuantizationSpec):
        annotation.output_qspec = wanted[0]


def _wanted_by_readers(node: Node) -> Iterator[Any]:
    """Yields the specification of each edge from `node`; None where the reader takes floats."""
    for reader in node.users:
        annotation = _annotation(reader)
        yield None if annotation is None else annotation.input_qspec_map.get(node)


def _weight_spec(spec: QuantizationSpec, config: WeightQuantizationConfig) -> QuantizationSpec:
    half = 2 ** (config.bits - 1)
    scheme = _WEIGHT_SCHEMES[config.scheme, config.granularity]
    ch_axis = spec.ch_axis if config.granularity == "channel" else None
    return dataclasses.replace(spec, quant_min=-half, quant_max=half - 1, qscheme=scheme, ch_axis=ch_axis)


def _activation_spec(spec: QuantizationSpec, config: ActivationQuantizationConfig) -> QuantizationSpec:
    return dataclasses.replace(spec, quant_max=2**config.bits - 1, qscheme=_ACTIVATION_SCHEMES[config.scheme])
