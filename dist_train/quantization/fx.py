"""The fx backend: torch.ao's graph mode, symbolically traced, around our own fake quantization. Deprecated in torch; pt2e is its successor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.qconfig_mapping import QConfigMapping, get_default_qat_qconfig_mapping
from torch.fx import GraphModule

from dist_train.config_fit import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.program import Program
from dist_train.quantization import torch_ao
from dist_train.quantization.float_model import quietly
from dist_train.quantization.graph_rewrite import name_fake_quantizers
from dist_train.quantization.integer import IntegerModel, integer_program
from dist_train.quantization.padding import pad_before_modules
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.prepared_modules import PreparedModules, statistics_names
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.rules import resolve_rules, shown
from dist_train.torchscript import integer_kernels

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # whose weights are simulated, see `_mapping`


class FXBackend:
    """Implements `dist_train.quantization.backend.QuantizationBackend`."""

    def __init__(self, engine: str = "auto") -> None:
        """engine: as `qat.engine`.

        Raises:
            QuantizationError: this torch does not have its kernels.
        """
        self.engine = torch_ao.choose_engine(engine)

    def check(self, model: nn.Module, rules: Sequence[RuleConfig] = ()) -> None:
        """See QuantizationBackend.check."""
        resolve_rules(model, rules)
        for rule in rules:
            _refuse_unsupported(rule)
        torch_ao.check_model(model)
        with quietly():
            pad_before_modules(_trace(copy.deepcopy(model).eval()))

    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[RuleConfig] = ()) -> PreparedModules:
        """See QuantizationBackend.prepare. The result is on the model's device and in its mode."""
        self.check(model, rules)
        mapping = _mapping(self.engine)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, rule in resolve_rules(model, rules).items():
            if rule.skip:
                mapping.set_module_name(name, None)
            elif rule.weight is not None and isinstance(modules[name], _WEIGHTED):
                mapping.set_module_name(
                    name, torch_ao.qconfig(self.engine, per_tensor=rule.weight.granularity == "tensor")
                )
        with quietly():
            float_copy = torch_ao.make_ready(copy.deepcopy(model))
            names = statistics_names(float_copy)
            # Traced in evaluation mode, so that functional dropout is off in training, too.
            graph = _trace(float_copy.eval())
            pad_before_modules(graph)
            prepared = torch_ao.prepare_qat_fx(graph.train(), mapping, (example,))
        name_fake_quantizers(prepared)
        result = PreparedModules(prepared, names)
        if not result.fake_quantizers:
            raise QuantizationError(
                f"{type(model).__name__} has nothing that can be quantized: no convolution or Linear that is not skipped",
                "remove rules that skip too much, or leave `qat` and `convert` out of `stages`",
            )
        return result.train(model.training)

    def convert(self, prepared: PreparedModel) -> IntegerModel:
        """See QuantizationBackend.convert."""
        assert isinstance(prepared, PreparedModules)
        Ranges(prepared).require_known()
        model = copy.deepcopy(prepared.model).cpu().eval()
        assert isinstance(model, GraphModule)
        with quietly(), integer_kernels(self.engine):
            return IntegerModel(_copy_before_means(torch_ao.convert_fx(model)), self.engine)

    def serialize(self, converted: nn.Module, example: Tensor) -> Program:
        """See QuantizationBackend.serialize."""
        return integer_program(converted, example)


def _refuse_unsupported(rule: RuleConfig) -> None:
    """Raises QuantizationError for what torch.ao's integer kernels cannot compute; the config's check says it earlier."""
    weight = rule.weight
    if rule.activation is not None or (weight is not None and (weight.bits != 8 or weight.scheme != "symmetric")):
        raise QuantizationError(
            f"the quantization rule {shown(rule)} asks for what the fx backend's integer kernels cannot compute: "
            "they take symmetric 8-bit weights, and activations as the engine has them",
            "--qat.backend pt2e",
        )


def _mapping(engine: str) -> QConfigMapping:
    """torch.ao's default for the engine; ours in place of its fake quantization, but for outputs of fixed ranges (a sigmoid's).

    What torch.ao would quantize at conversion without having simulated it in training (transposed convolutions, normalisations
    with weights, PReLU) stays in floating point.
    """
    default, mapping = get_default_qat_qconfig_mapping(engine), QConfigMapping().set_global(torch_ao.qconfig(engine))
    assert default.global_qconfig is not None
    usual = default.global_qconfig.activation.p.func
    for kind, qconfig in default.object_type_qconfigs.items():
        unsimulated = qconfig is not None and getattr(getattr(qconfig.activation, "p", None), "func", None) is usual
        mapping.set_object_type(kind, None if unsimulated or kind is nn.PReLU else qconfig)
    return mapping


def _trace(model: nn.Module) -> GraphModule:
    try:
        return torch.fx.symbolic_trace(model)
    except (RuntimeError, TypeError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise QuantizationError(
            f"torch.fx cannot trace {type(model).__name__}: {first}",
            "make forward free of branches that depend on the data, or try --qat.backend pt2e",
        ) from error


def _copy_before_means(model: GraphModule) -> GraphModule:
    """torch's integer mean over height and width fails where both are 1 and the strides are those of channels_last ("required rank 4")."""
    for node in list(model.graph.nodes):
        if node.args and (node.op, node.target) in (("call_method", "mean"), ("call_function", torch.mean)):
            with model.graph.inserting_before(node):
                contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
                copied = model.graph.call_method("clone", (node.args[0],), contiguous)
            node.args = (copied, *node.args[1:])
    model.recompile()
    return model
