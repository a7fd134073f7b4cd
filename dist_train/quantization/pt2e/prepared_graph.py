"""Prepared model of an exported graph: one set of tensors, with a graph for training and one for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen

from dist_train.errors import QuantizationError
from dist_train.quantization.byte_masks import use_byte_masks
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.fx_nodes import layer_of, quantized_weights
from dist_train.quantization.layer_sqnr import compare_graphs
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.graph_rewrite import (
    DROPOUTS,
    batch_norm_name,
    batch_norms,
    folded_batch_norms,
    use_batch_statistics,
    use_dropout,
)

_Code = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Blueprint:
    """Computation of a prepared model, without its tensors. It is never modified, so that copies of a model share it.

    Each function is the graph's code, called with the module that holds the tensors and with x.

    Attributes:
        graph: the evaluation graph.
        meta: of the prepared GraphModule, for convert.
        evaluate: evaluation.
        train: training, with the batch's statistics.
        train_frozen: training, with the running statistics.
        moments: evaluation with the batch's statistics, which replace the running ones.
    """

    graph: Graph
    meta: dict[str, Any]
    evaluate: _Code
    train: _Code
    train_frozen: _Code
    moments: _Code

    def __deepcopy__(self, memo: dict[int, Any]) -> Blueprint:
        return self


class PreparedGraph(PreparedModel):
    """Prepared model of the pt2e backend.

    Float parameters and buffers have the float model's names; fake-quantize modules are in `quantizers`. `train()` and
    `eval()` choose the graph. The training graph normalizes by the running statistics after `freeze_batch_norm()`.
    Dropout is off in all graphs until `keep_dropout()`, as the model was exported in evaluation mode.
    """

    def __init__(self, module: GraphModule, settled: Collection[str] = ()) -> None:
        """
        Args:
            module: from prepare_qat_pt2e, with its literals restored. Its tensors are moved here, not copied.
            settled: batch norms that normalize by their running statistics in training, too.
        """
        super().__init__()
        for name, child in module.named_children():
            self._refuse_taken(name)
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self._refuse_taken(name)
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self._refuse_taken(name)
            self.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        graph = _plain_signature(module)
        self._batch_statistics = partial(use_batch_statistics, settled=frozenset(settled))
        evaluate = _code(module, graph)
        self.blueprint = Blueprint(
            graph,
            dict(module.meta),
            evaluate=evaluate,
            train=_code(module, _with(graph, use_byte_masks, self._batch_statistics)),
            train_frozen=_code(module, _with(graph, use_byte_masks)),
            moments=_code(module, _with(graph, partial(self._batch_statistics, momentum=1.0))),
        )
        self._leaving_moments = False
        owners = (batch_norm_name(node) for node in batch_norms(graph))
        self.batch_norms = {owner: owner for owner in owners if owner is not None}

    def _refuse_taken(self, name: str) -> None:
        if hasattr(self, name):
            raise QuantizationError(
                f"the model has an attribute named `{name}`, which a prepared model needs itself", "rename it"
            )

    @property
    def fixed_fake_quantizers(self) -> list[nn.Module]:
        """See PreparedModel.fixed_fake_quantizers. X86InductorQuantizer places none."""
        return []

    def literals(self) -> Iterator[tuple[str, float]]:
        """See PreparedModel.literals. The eps of a folded batch norm is in two places."""
        graph, found = self.blueprint.graph, list[tuple[str, Any]]()
        for node in batch_norms(graph):
            name = batch_norm_name(node)
            if name is not None:
                found += [(f"{name}.momentum", node.args[6]), (f"{name}.eps", node.args[7])]
        found += [
            (f"{batch_norm_name(folded.batch_norm)}.eps", folded.eps.args[1]) for folded in folded_batch_norms(graph)
        ]
        for target in DROPOUTS:
            found += [
                (f"{layer_of(node)}.p", node.args[1]) for node in graph.find_nodes(op="call_function", target=target)
            ]
        return iter(found)

    def forward(self, x: Tensor) -> Tensor:
        """x: shaped as the example, with any batch size. Returns as the float model."""
        if self._leaving_moments:
            return self.blueprint.moments(self, x)
        if not self.training:
            return self.blueprint.evaluate(self, x)
        return self.blueprint.train_frozen(self, x) if self.batch_norm_frozen else self.blueprint.train(self, x)

    def keep_dropout(self) -> None:
        """See PreparedModel.keep_dropout. Dropout inside attention was exported as a constant 0, and stays off."""
        graph = self.blueprint.graph
        self.blueprint = replace(
            self.blueprint,
            train=_code(self, _with(graph, use_byte_masks, self._batch_statistics, use_dropout)),
            train_frozen=_code(self, _with(graph, use_byte_masks, use_dropout)),
        )

    @contextmanager
    def batch_moments(self) -> Iterator[None]:
        """See PreparedModel.batch_moments."""
        with self.observing(False):
            self._leaving_moments = True
            try:
                yield
            finally:
                self._leaving_moments = False

    def integer_weights(self) -> Collection[str]:
        """See PreparedModel.integer_weights."""
        return list(quantized_weights(self.graph_module()))

    def layer_sqnr(self, converted: nn.Module, inputs: Tensor) -> dict[str, float]:
        """See PreparedModel.layer_sqnr.

        Nodes keep their names in conversion. Of a folded batch norm the convolution stays, and its output is the batch
        norm's.
        """
        if not isinstance(converted, GraphModule):  # of a backend with a conversion of its own
            return {}
        module = self.graph_module()
        kept = {node.name: node.target for node in converted.graph.nodes if node.op == "call_function"}
        wanted = {node.name: node.name for node in module.graph.nodes if kept.get(node.name) is node.target}
        for folded in folded_batch_norms(module.graph):
            del wanted[folded.convolution.name]
            wanted[folded.batch_norm.name] = folded.convolution.name
        return compare_graphs(module, wanted, converted, inputs, (ActivationFakeQuantize,))

    def graph_module(self) -> GraphModule:
        """Returns a new GraphModule of the evaluation graph with this model's own tensors (not copies)."""
        module = GraphModule(self, _copy(self.blueprint.graph))
        module.meta.update(self.blueprint.meta)
        return module


def _with(graph: Graph, *changes: Callable[[Graph], None]) -> Graph:
    """Returns a changed copy of a graph."""
    copied = _copy(graph)
    for change in changes:
        change(copied)
    return copied


def _copy(graph: Graph) -> Graph:
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def _plain_signature(module: GraphModule) -> Graph:
    """Copies the module's graph, without the flattening of nested inputs and outputs around it.

    Raises:
        QuantizationError: the model does not take one tensor and return one tensor.
    """
    graph = _copy(module.graph)
    graph.set_codegen(CodeGen())
    inputs = graph.find_nodes(op="placeholder")
    output = graph.output_node()
    values = output.args[0]
    if (
        len(inputs) != 1
        or not isinstance(values, (tuple, list))
        or len(values) != 1
        or module._out_spec is None
        or not module._out_spec.is_leaf()
    ):
        returned = len(values) if isinstance(values, (tuple, list)) else 1
        raise QuantizationError(
            f"the model takes {len(inputs)} inputs and returns {returned} values",
            "wrap it in a module whose forward takes one tensor and returns one tensor",
        )
    output.args = (values[0],)
    return graph


def _code(root: nn.Module, graph: Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    """Returns a graph's generated function, unbound: it reads its tensors from the module that it is called with."""
    return type(GraphModule(root, graph)).forward
