"""The fx backend: torch.ao's FX graph mode, with our own fake quantization. Deprecated in torch in favor of pt2e."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.qconfig_mapping import QConfigMapping, get_default_qat_qconfig_mapping
from torch.fx import GraphModule

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.programs.torchscript import integer_kernels
from dist_train.quantization.attention import open_attention
from dist_train.quantization.batch_norm_calls import settled_batch_norms
from dist_train.quantization.dry_run import FAILURES, dry_run
from dist_train.quantization.float_checks import quietly
from dist_train.quantization.fx_nodes import module_of, name_fake_quantizers
from dist_train.quantization.padding import pad_before_modules
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.rules import idle_skip, resolve_rules, shown, skipped_modules
from dist_train.quantization.torch_ao import common, graph_rewrite
from dist_train.quantization.torch_ao.computed_weights import fold_computed_weights, keep_computed_weights
from dist_train.quantization.torch_ao.float_output import use_float_outputs
from dist_train.quantization.torch_ao.fx_grids import (
    all_bits,
    clamp_integers,
    float_results,
    saturating_clamps,
    trained_heads,
)
from dist_train.quantization.torch_ao.integer_model import IntegerModel, TorchAOBackend
from dist_train.quantization.torch_ao.prepared_modules import TracedModules, statistics_names
from dist_train.quantization.torch_ao.tracing import Traced, by_position, trace
from dist_train.quantization.torch_ao.window_attention import open_windows
from dist_train.trees import Tree

_AVERAGES: tuple[Any, ...] = (
    *common.AVERAGES,
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(torch.mean, "mean"),
)
_EMBEDDINGS: tuple[Any, ...] = (nn.Embedding, nn.EmbeddingBag, F.embedding, F.embedding_bag)  # read, not multiplied
_CLAMPS: tuple[Any, ...] = (F.hardtanh, F.relu6, torch.clamp, torch.clip, "clamp", "clamp_", "clip")
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # their weights are fake-quantized in training, see `_mapping`
_WEIGHTED_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear, torch.conv1d, torch.conv2d, torch.conv3d)


class FXBackend(TorchAOBackend):
    """Implements `dist_train.quantization.backend.QuantizationBackend`."""

    def check(self, model: nn.Module, rules: Sequence[RuleConfig] = (), example: Tree | None = None) -> None:
        """See QuantizationBackend.check."""
        resolved = _checked_rules(model, rules)
        if example is not None:
            dry_run(self, model, example, rules, gradient_bound=self.gradient_bound)
            self._refuse_idle_skips(model, example, rules, resolved)

    def _refuse_idle_skips(
        self, model: nn.Module, example: Tree, rules: Sequence[RuleConfig], resolved: Mapping[str, RuleConfig]
    ) -> None:
        """Raises QuantizationError for a rule that skips modules without weights and changes nothing."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for rule in (each for each in rules if each.skip):
            owned = [modules[name].parameters(recurse=False) for name, each in resolved.items() if each is rule]
            if any(parameter.dim() > 1 for parameters in owned for parameter in parameters):
                continue
            try:
                without = self.prepare(model, example, [each for each in rules if each is not rule])
            except FAILURES:
                continue  # the model cannot be prepared without the rule
            if _layout(without) == _layout(self.prepare(model, example, rules)):
                raise idle_skip(rule)

    def prepare(self, model: nn.Module, example: Tree, rules: Sequence[RuleConfig] = ()) -> TracedModules:
        """See QuantizationBackend.prepare. The result is on the model's device and in its mode."""
        resolved = _checked_rules(model, rules)
        with quietly():
            float_copy = common.make_ready(copy.deepcopy(model))
            names, settled = statistics_names(float_copy), settled_batch_norms(copy.deepcopy(float_copy), example)
            open_attention(float_copy)
            open_windows(float_copy)
            # Traced in evaluation mode, so that functional dropout is off in training, too.
            traced = trace(float_copy.eval(), example, self.dynamic)
            graph, mapping = traced.graph, _mapping(self.engine)
            self._set_rules(mapping, model, resolved, traced)
            pad_before_modules(graph)
            graph_rewrite.write_out_factors(graph)
            graph_rewrite.write_out_convolutions(graph)
            self._set_rules_of_functions(mapping, graph, resolved)
            _keep_factors_in_float(graph, mapping)
            apart = graph_rewrite.part_batch_norms(graph)
            for name in (*apart, *graph_rewrite.hidden_layers(graph)):
                mapping.set_module_name(name, None)
            prepared = common.prepare_qat_fx(graph.train(), mapping, by_position(graph.graph, example))
            graph_rewrite.remove_calls(prepared, apart)
        keep_computed_weights(prepared)
        float_results(prepared)
        saturating_clamps(prepared)
        all_bits(prepared)
        name_fake_quantizers(prepared)
        result = TracedModules(prepared, names, settled, traced.renamed)
        if not result.fake_quantizers:
            raise QuantizationError(
                f"{type(model).__name__} has nothing that can be quantized: "
                "no convolution or Linear that is not skipped",
                "remove rules that skip too much, or leave `qat` and `convert` out of `stages`",
            )
        result.train(model.training)
        return result

    def _set_rules(
        self, mapping: QConfigMapping, model: nn.Module, resolved: Mapping[str, RuleConfig], traced: Traced
    ) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        here = {name: new for new, name in traced.renamed.items()}
        for name, rule in resolved.items():
            top, dot, rest = name.partition(".")
            place = here.get(top, top) + dot + rest
            if rule.skip:
                mapping.set_module_name(place, None)
            elif rule.weight is not None and isinstance(modules[name], _WEIGHTED):
                mapping.set_module_name(
                    place, common.qconfig(self.engine, per_tensor=rule.weight.granularity == "tensor")
                )

    def _set_rules_of_functions(
        self, mapping: QConfigMapping, graph: GraphModule, resolved: Mapping[str, RuleConfig]
    ) -> None:
        """Applies rules to functional layers, as of a convolution that standardizes its weight: by their order."""
        order = Counter[Any]()
        for node in (each for each in graph.graph.nodes if each.op == "call_function"):
            index = order[node.target]
            order[node.target] += 1
            rule = resolved.get(module_of(node))
            if rule is None:
                continue
            if rule.skip:
                mapping.set_module_name_object_type_order("", node.target, index, None)
            elif rule.weight is not None and node.target in _WEIGHTED_FUNCTIONS:
                wanted = common.qconfig(self.engine, per_tensor=rule.weight.granularity == "tensor")
                mapping.set_module_name_object_type_order("", node.target, index, wanted)

    def convert(self, prepared: PreparedModel) -> IntegerModel:
        """See QuantizationBackend.convert."""
        assert isinstance(prepared, TracedModules)
        Ranges(prepared).require_known()
        model: GraphModule = copy.deepcopy(prepared.model).cpu().eval()
        with quietly(), integer_kernels(self.engine):
            fold_computed_weights(model)
            clamp_integers(model)
            use_float_outputs(model, trained_heads(model))
            stay_float = _hide(model)
            converted = common.convert_fx(model)
            _show(converted, stay_float)
            if self.engine == "qnnpack":
                _clamp_in_order(converted)
            return IntegerModel(converted, self.engine)


def _checked_rules(model: nn.Module, rules: Sequence[RuleConfig]) -> dict[str, RuleConfig]:
    """Checks rules and modules, and returns the resolved rules; see `resolve_rules`."""
    resolved = resolve_rules(model, rules)
    for rule in rules:
        _refuse_unsupported(rule)
    common.check_model(model, skipped_modules(resolved))
    return resolved


def _layout(prepared: TracedModules) -> tuple[object, list[tuple[str, str]]]:
    """Returns the generated code, and the modules' names and classes: equal for models that compute the same."""
    return prepared.model.code, [(name, type(module).__name__) for name, module in prepared.named_modules()]


def _refuse_unsupported(rule: RuleConfig) -> None:
    """Raises QuantizationError for a rule beyond torch.ao's integer kernels. The config's check finds it earlier."""
    weight = rule.weight
    if rule.activation is not None or (weight is not None and (weight.bits != 8 or weight.scheme != "symmetric")):
        raise QuantizationError(
            f"the quantization rule {shown(rule)} asks for what the fx backend's integer kernels cannot compute: "
            "they take symmetric 8-bit weights, and activations as the engine has them",
            "--qat.backend pt2e",
        )


def _mapping(engine: str) -> QConfigMapping:
    """Returns torch.ao's default for the engine, with our fake quantization except for fixed ranges (sigmoid).

    torch.ao would quantize some modules at conversion without fake quantization in training: transposed convolutions,
    normalizations with weights, PReLU. They stay in floating point here. So do averages: the layer that reads one gets
    integers of a range of its own.
    """
    default, mapping = get_default_qat_qconfig_mapping(engine), QConfigMapping().set_global(common.qconfig(engine))
    assert default.global_qconfig is not None
    usual = default.global_qconfig.activation.p.func
    for kind, qconfig in default.object_type_qconfigs.items():
        unsimulated = qconfig is not None and getattr(getattr(qconfig.activation, "p", None), "func", None) is usual
        mapping.set_object_type(kind, None if unsimulated or kind is nn.PReLU else qconfig)
    for kind in (*_AVERAGES, *_EMBEDDINGS):
        mapping.set_object_type(kind, None)
    return mapping


def _keep_factors_in_float(graph: GraphModule, mapping: QConfigMapping) -> None:
    """Keeps products of an activation and a number in float.

    The integer kernel scales the grid by the number, but torch.ao's fake quantization has the activation's own grid.
    """
    for kind in (operator.mul, torch.mul):
        for index, node in enumerate(graph.graph.find_nodes(op="call_function", target=kind)):
            if len(node.all_input_nodes) == 1 and len(node.args) == 2 and node.args[0] is not node.args[1]:
                mapping.set_module_name_object_type_order("", kind, index, None)


@dataclass(frozen=True)
class _Operation:
    """The call of a node before it was hidden, with the module of a module call."""

    op: str
    target: Any
    module: nn.Module | None


def _hidden(*args: Any, **kwargs: Any) -> Tensor:
    """Replaces operations without a qconfig while torch.ao converts: it would give some of them integer kernels."""
    raise AssertionError("only a name in a graph")


def _hide(model: GraphModule) -> dict[str, _Operation]:
    """Replaces operations that stay in floating point by `_hidden`, in place. Returns them by node name."""
    found, modules = dict[str, _Operation](), dict(model.named_modules(remove_duplicate=False))
    qconfigs = model.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    for node in model.graph.nodes:
        if node.op.startswith("call_") and qconfigs.get(node.name, node) is None:
            module = modules[str(node.target)] if node.op == "call_module" else None
            found[node.name] = _Operation(node.op, node.target, module)
            node.op, node.target = "call_function", _hidden
    model.recompile()
    return found


def _show(model: GraphModule, hidden: Mapping[str, _Operation]) -> None:
    """Undoes `_hide` after conversion, in place. Conversion drops modules that no node calls."""
    for node in model.graph.find_nodes(op="call_function", target=_hidden):
        operation = hidden[node.name]
        if operation.module is not None:
            model.add_submodule(operation.target, operation.module)
        node.op, node.target = operation.op, operation.target
    model.recompile()


def _clamp_in_order(converted: GraphModule) -> None:
    """Makes the input of each clamp contiguous, in place.

    qnnpack's convolutions return channels_last, whose order its clamps misread.
    """
    for node in list(converted.graph.nodes):
        module = converted.get_submodule(str(node.target)) if node.op == "call_module" else None
        if (node.op.startswith("call_") and node.target in _CLAMPS) or isinstance(
            module, (nn.Hardtanh, torch.ao.nn.quantized.ReLU6)
        ):
            source = node.all_input_nodes[0]
            with converted.graph.inserting_before(node):
                node.replace_input_with(source, converted.graph.call_method("contiguous", (source,)))
    converted.recompile()
