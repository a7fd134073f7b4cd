"""Quantization backends with one planted fault each: --import tests.support.faulty_backends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from unittest import mock

from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

import dist_train
from dist_train.config.stages import RuleConfig
from dist_train.programs.program import Program
from dist_train.quantization.fx_nodes import layer_of
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e import graph_rewrite
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from dist_train.quantization.torch_ao.fx import FXBackend
from dist_train.quantization.torch_ao.integer_model import IntegerModel
from dist_train.quantization.torch_ao.prepared_modules import TracedModules

Edit = Callable[[Graph], None]


def _without_restoring(then: Edit) -> Any:
    """Prepares with `then` in place of restoring the literals that torchao changes."""
    return mock.patch.object(graph_rewrite, "restore_batch_norms", lambda graph, literals: then(graph))


class _Edited(PT2EBackend):
    """Prepares correctly, then edits the graph before its code is generated."""

    edit: ClassVar[Edit]

    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[RuleConfig] = ()) -> PreparedGraph:
        restore = graph_rewrite.restore_batch_norms

        def faulty(graph: Graph, literals: Any) -> None:
            restore(graph, literals)
            type(self).edit(graph)

        with mock.patch.object(graph_rewrite, "restore_batch_norms", faulty):
            return super().prepare(model, example, rules)


@dist_train.register_quantization_backend("stock_pt2e")
class Stock(PT2EBackend):
    """torchao's own prepare_qat_pt2e: every batch norm gets eps 1e-5 and momentum 0.1."""

    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[RuleConfig] = ()) -> PreparedGraph:
        with _without_restoring(lambda graph: None):
            return super().prepare(model, example, rules)


@dist_train.register_quantization_backend("other_eps")
class OtherEps(_Edited):
    @staticmethod
    def edit(graph: Graph) -> None:
        folded = graph_rewrite.folded_batch_norms(graph)[-1]
        folded.eps.args = (folded.eps.args[0], 1e-5)
        folded.batch_norm.args = (*folded.batch_norm.args[:7], 1e-5, *folded.batch_norm.args[8:])


@dist_train.register_quantization_backend("other_momentum")
class OtherMomentum(_Edited):
    @staticmethod
    def edit(graph: Graph) -> None:
        *_, last = graph_rewrite.batch_norms(graph)
        last.args = (*last.args[:6], 0.1, *last.args[7:])


@dist_train.register_quantization_backend("other_dropout")
class OtherDropout(_Edited):
    """Changes dropout as torchao's move_exported_model_to_train does."""

    @staticmethod
    def edit(graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=graph_rewrite.DROPOUTS[0]):
            node.args = (node.args[0], 0.5, node.args[2])


@dist_train.register_quantization_backend("fx_other_literals")
class FXOtherLiterals(FXBackend):
    """Plants the same three faults in the modules of fx."""

    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[RuleConfig] = ()) -> TracedModules:
        prepared = super().prepare(model, example, rules)
        norm = prepared.get_submodule(prepared.batch_norms["bn2"])
        assert isinstance(norm, _BatchNorm)
        norm.eps, norm.momentum = 1e-5, 0.1
        prepared.model.get_submodule("dropout").p = 0.5  # type: ignore[assignment]
        return prepared


def scale_of(converted: nn.Module, layer: str, factor: float) -> None:
    """Multiplies one scale of a converted layer in place: the weight's (pt2e) or the output's (fx, eager)."""
    if isinstance(converted, IntegerModel):
        converted.model.get_submodule(layer).scale *= factor  # type: ignore[operator, assignment]
        return
    assert isinstance(converted, GraphModule)
    nodes = [node for node in converted.graph.nodes if node.op == "call_function" and len(node.args) > 1]
    weights = [node.args[1] for node in nodes if layer_of(node) == layer]
    (weight,) = [each for each in weights if "dequantize" in str(getattr(each, "target", ""))]
    converted.get_buffer(str(weight.args[1].target)).mul_(factor)


class _Wrong:
    """Corrupts one scale in one layer of the converted model."""

    layer = "conv2"

    def convert(self, prepared: PreparedModel) -> nn.Module:
        converted: nn.Module = super().convert(prepared)  # type: ignore[misc]
        scale_of(converted, self.layer, 40.0)
        return converted


@dist_train.register_quantization_backend("wrong_scale")
class WrongScale(_Wrong, PT2EBackend):
    pass


@dist_train.register_quantization_backend("fx_wrong_scale")
class FXWrongScale(_Wrong, FXBackend):
    layer = "conv1"  # its outputs become zero; conv2 would not do, as the residual keeps the decisions


@dist_train.register_quantization_backend("other_program")
class OtherProgram(PT2EBackend):
    """Serialises a model that differs slightly from the converted one in memory."""

    def serialize(self, converted: nn.Module, example: Tensor) -> Program:
        other = copy.deepcopy(converted)
        scale_of(other, "fc", 1.0001)
        return super().serialize(other, example)


@dist_train.register_quantization_backend("worse_each_time")
class WorseEachTime(FXBackend):
    """Converts correctly twice (check and first conversion), then rounds a layer's outputs to zero each time."""

    conversions = 0

    def convert(self, prepared: PreparedModel) -> IntegerModel:
        converted = super().convert(prepared)
        WorseEachTime.conversions += 1
        if WorseEachTime.conversions > 2:
            scale_of(converted, "conv1", 1000.0)
        return converted
