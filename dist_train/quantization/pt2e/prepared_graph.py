"""The prepared model of an exported graph: one set of tensors, one graph for training and one for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from dist_train.errors import QuantizationError
from dist_train.quantization.byte_masks import use_byte_masks
from dist_train.quantization.fx_nodes import layer_of
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.graph_rewrite import (
    DROPOUTS,
    batch_norm_tensors,
    batch_norms,
    folded_batch_norms,
    use_batch_statistics,
    use_dropout,
)

_Code = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Blueprint:
    """What a prepared model computes, without its tensors. It is never modified, so that copies of a model share it.

    The functions are the code of the graph, of (the module that holds the tensors, x): in evaluation; in training, by the batch's
    statistics or by frozen ones; and by the batch's, which are left in the running ones. `meta` is for convert.
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
    """What pt2e makes: float parameters and buffers under the float model's names, and fake-quantize modules under `quantizers`.

    `train()` and `eval()` choose the graph; in training mode after `freeze_batch_norm()` it normalises by the running statistics.
    Dropout is off in all, as the model was exported in evaluation mode, until `keep_dropout()`.
    """

    def __init__(self, module: GraphModule) -> None:
        """module: what prepare_qat_pt2e made, with its literals restored. Its tensors are taken over, not copied."""
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
        evaluate = _code(module, graph)
        self.blueprint = Blueprint(
            graph,
            dict(module.meta),
            evaluate=evaluate,
            train=_code(module, _with(graph, use_byte_masks, use_batch_statistics)),
            train_frozen=_code(module, _with(graph, use_byte_masks)),
            moments=_code(module, _with(graph, partial(use_batch_statistics, momentum=1.0))),
        )
        self._leaving_moments = False
        owners = (_owner(node) for node in batch_norms(graph))
        self.batch_norms = {owner: owner for owner in owners if owner is not None}

    def _refuse_taken(self, name: str) -> None:
        if hasattr(self, name):
            raise QuantizationError(
                f"the model has an attribute named `{name}`, which a prepared model needs itself", "rename it"
            )

    @property
    def fixed_fake_quantizers(self) -> list[nn.Module]:
        return []  # X86InductorQuantizer places none

    def literals(self) -> Iterator[tuple[str, float]]:
        """See PreparedModel.literals. Of a folded batch norm eps stands in two places."""
        graph, found = self.blueprint.graph, list[tuple[str, Any]]()
        for node in batch_norms(graph):
            name = _owner(node)
            if name is not None:
                found += [(f"{name}.momentum", node.args[6]), (f"{name}.eps", node.args[7])]
        found += [(f"{_owner(folded.batch_norm)}.eps", folded.eps.args[1]) for folded in folded_batch_norms(graph)]
        for target in DROPOUTS:
            found += [
                (f"{layer_of(node)}.p", node.args[1]) for node in graph.find_nodes(op="call_function", target=target)
            ]
        return iter(found)

    def forward(self, x: Tensor) -> Tensor:
        """x: shaped as the example, with any batch size. What the float model returns."""
        if self._leaving_moments:
            return self.blueprint.moments(self, x)
        if not self.training:
            return self.blueprint.evaluate(self, x)
        return self.blueprint.train_frozen(self, x) if self.batch_norm_frozen else self.blueprint.train(self, x)

    def keep_dropout(self) -> None:
        """See PreparedModel.keep_dropout. Dropout inside attention is a constant 0 in the exported graph, and stays that."""
        graph = self.blueprint.graph
        self.blueprint = replace(
            self.blueprint,
            train=_code(self, _with(graph, use_byte_masks, use_batch_statistics, use_dropout)),
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

    def graph_module(self) -> GraphModule:
        """A new GraphModule of the evaluation graph over this model's own tensors (not copies)."""
        module = GraphModule(self, _copy(self.blueprint.graph))
        module.meta.update(self.blueprint.meta)
        return module


def _with(graph: Graph, *changes: Callable[[Graph], None]) -> Graph:
    """A changed copy."""
    copied = _copy(graph)
    for change in changes:
        change(copied)
    return copied


def _owner(batch_norm: Node) -> str | None:
    """The name of the module whose running statistics a batch norm reads, where it has any."""
    variance = batch_norm_tensors(batch_norm)[3]
    return None if variance is None else variance.rpartition(".")[0]


def _copy(graph: Graph) -> Graph:
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def _plain_signature(module: GraphModule) -> Graph:
    """A copy of the module's graph that takes a tensor and returns a tensor, without flattening of structures around it.

    Raises:
        QuantizationError: the model takes or returns anything else.
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
        raise QuantizationError(
            f"the model takes {len(inputs)} inputs and returns {len(values) if isinstance(values, (tuple, list)) else 1} values",
            "wrap it in a module whose forward takes one tensor and returns one tensor",
        )
    output.args = (values[0],)
    return graph


def _code(root: nn.Module, graph: Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    """The function that a graph generates, unbound: it reads its tensors from whatever module it is given."""
    return type(GraphModule(root, graph)).forward
