"""Prepared model of an exported graph: one set of tensors, with a graph for training and one for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen

from dist_train import trees
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
from dist_train.quantization.pt2e.segments import code_in_segments
from dist_train.quantization.pt2e.tree_signature import TreeSignature
from dist_train.trees import Tree

_Code = Callable[..., Any]


@dataclass(frozen=True)
class Blueprint:
    """Computation of a prepared model, without its tensors. It is never modified, so that copies of a model share it.

    Each function is the graph's code, called with the module that holds the tensors and with the leaves of the inputs.

    Attributes:
        graph: the evaluation graph.
        meta: of the prepared GraphModule, for convert.
        evaluate: evaluation.
        train: training, with the batch's statistics.
        train_frozen: training, with the running statistics.
        moments: evaluation with the batch's statistics, which replace the running ones.
        signature: of inputs or outputs that are a tree; None for one tensor in and one out.
    """

    graph: Graph
    meta: dict[str, Any]
    evaluate: _Code
    train: _Code
    train_frozen: _Code
    moments: _Code
    signature: TreeSignature | None

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
        signature = TreeSignature.of(module)
        graph = _plain_signature(module, signature)
        self._settled, self._held, self._dropout = frozenset(settled), frozenset[str](), False
        self._recomputed: tuple[str, ...] = ()
        self._written: dict[tuple[frozenset[str], bool, tuple[str, ...]], tuple[_Code, _Code, _Code]] = {}
        evaluate = _code(module, graph)
        training = self._training(module, graph)
        self.blueprint = Blueprint(graph, dict(module.meta), evaluate, *training, signature=signature)
        self._leaving_moments = False
        owners = (batch_norm_name(node) for node in batch_norms(graph))
        self.batch_norms = {owner: owner for owner in owners if owner is not None}

    def _training(self, root: nn.Module, graph: Graph) -> tuple[_Code, _Code, _Code]:
        """Returns `train`, `train_frozen` and `moments` of a blueprint."""
        chosen = self._held, self._dropout, self._recomputed
        if chosen not in self._written:  # kept, as torch.compile knows code by its identity
            by_batch = partial(use_batch_statistics, settled=self._settled | self._held)
            changes = (use_byte_masks, use_dropout) if self._dropout else (use_byte_masks,)
            code = partial(code_in_segments, names=self._recomputed) if self._recomputed else _code
            self._written[chosen] = (
                code(root, _with(graph, *changes, by_batch)),
                code(root, _with(graph, *changes)),
                _code(root, _with(graph, partial(by_batch, momentum=1.0))),
            )
        return self._written[chosen]

    def _rewrite(self) -> None:
        train, train_frozen, moments = self._training(self, self.blueprint.graph)
        self.blueprint = replace(self.blueprint, train=train, train_frozen=train_frozen, moments=moments)

    def hold_batch_norms(self, names: Collection[str]) -> None:
        """See PreparedModel.hold_batch_norms. They are operations of the graph, which is written anew."""
        held = frozenset(name for name in names if name in self.batch_norms)
        if held != self._held:
            self._held = held
            self._rewrite()

    def recompute(self, names: Sequence[str]) -> None:
        """See PreparedModel.recompute. The training graphs are cut into pieces."""
        if tuple(names) != self._recomputed:
            self._recomputed = tuple(names)
            self._rewrite()

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

    def forward(self, *args: Any, **kwargs: Any) -> Tree:
        """Takes what the example has, with any batch size. Returns as the float model; a tree is `trees.plain`."""
        code, signature = self._code(), self.blueprint.signature
        if signature is None:
            return code(self, *args, **kwargs)
        return signature.tree(code(self, *signature.leaves(args, kwargs)))

    def _code(self) -> _Code:
        if self._leaving_moments:
            return self.blueprint.moments
        if not self.training:
            return self.blueprint.evaluate
        return self.blueprint.train_frozen if self.batch_norm_frozen else self.blueprint.train

    def keep_dropout(self) -> None:
        """See PreparedModel.keep_dropout. Dropout inside attention was exported as a constant 0, and stays off."""
        self._dropout = True
        self._rewrite()

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

    def layer_sqnr(self, converted: nn.Module, inputs: Tree) -> dict[str, float]:
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
        signature = self.blueprint.signature
        leaves = [inputs] if signature is None else signature.leaves(*trees.arguments(inputs))
        return compare_graphs(module, wanted, converted, leaves, (ActivationFakeQuantize,))

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


def _plain_signature(module: GraphModule, signature: TreeSignature | None) -> Graph:
    """Copies the module's graph without the flattening of trees around it: it takes leaves, and returns them."""
    graph = _copy(module.graph)
    graph.set_codegen(CodeGen())
    if signature is None:
        output = graph.output_node()
        output.args = tuple(output.args[0])  # type: ignore[arg-type]
    return graph


def _code(root: nn.Module, graph: Graph) -> _Code:
    """Returns a graph's generated function, unbound: it reads its tensors from the module that it is called with."""
    return type(GraphModule(root, graph)).forward
