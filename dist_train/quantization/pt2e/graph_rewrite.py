"""Corrections of PT2E's graphs: literals of batch normalization, unwanted folding, training modes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, map_arg

from dist_train.errors import QuantizationError
from dist_train.quantization.fx_nodes import layer_of

aten = torch.ops.aten
BATCH_NORM = (
    aten.batch_norm.default
)  # (input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
DROPOUTS = tuple(  # (input, p, train)
    getattr(aten, name + suffix).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
)
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
)

Tensors = tuple[str | None, ...]  # the attributes that a batch norm reads: weight, bias, running_mean, running_var


@dataclass(frozen=True)
class FoldedBatchNorm:
    """A convolution with the batch norm that QAT folds into its weight: nodes of one graph.

    See torchao's `_get_qat_conv_bn_pattern`, after Krishnamoorthi, https://arxiv.org/abs/1806.08342, section 3.2.2.

    Attributes:
        eps: running_var + eps.
        scale_factor: the batch norm's weight / sqrt(running_var + eps).
        scaled_weight: the convolution's weight times the scale factor.
        convolution: with the scaled weight.
        unscaling: the division by the scale factor before the batch norm. torchao divides the convolution's output;
            after `divide_weights` the quantized weight is divided.
        batch_norm: of the unscaled output.
    """

    eps: Node
    scale_factor: Node
    scaled_weight: Node
    convolution: Node
    unscaling: Node
    batch_norm: Node

    @property
    def weight(self) -> Node:
        """The scaled weight, fake-quantized where the convolution is."""
        weight: Any = self.convolution.args[1]
        whole: Any = weight.args[0] if weight is self.unscaling else weight
        assert isinstance(whole, Node)
        return whole

    @property
    def bias(self) -> Node | None:
        """The convolution's own bias, added after the division."""
        added: Any = self.batch_norm.args[0]
        return None if added in (self.convolution, self.unscaling) else added.args[1].args[0]

    @property
    def quantized(self) -> bool:
        return self.weight is not self.scaled_weight


def batch_norms(graph: Graph) -> Iterator[Node]:
    """Yields the batch norms of data, in graph order; F.batch_norm may also standardize a weight."""
    found = graph.find_nodes(op="call_function", target=BATCH_NORM)
    fixed = computed_from_parameters(graph) if found else set()
    return (node for node in found if node not in fixed)


def computed_from_parameters(graph: Graph) -> set[Node]:
    """Returns the nodes that read parameters and buffers only, such as a standardized weight."""
    found = set[Node]()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        ):
            found.add(node)
    return found


def batch_norm_tensors(node: Node) -> Tensors:
    """Returns the names of the tensors that a batch norm reads, None where it reads none."""
    return tuple(str(arg.target) if isinstance(arg, Node) else None for arg in node.args[1:5])


def batch_norm_literals(graph: Graph) -> dict[Tensors, tuple[Any, ...]]:
    """Returns (training, momentum, eps, cudnn_enabled) of every batch norm, by its tensors. Called before prepare.

    Raises:
        QuantizationError: two batch norms with the same tensors have different settings.
    """
    literals: dict[Tensors, tuple[Any, ...]] = {}
    for node in batch_norms(graph):
        tensors = batch_norm_tensors(node)
        if literals.setdefault(tensors, tuple(node.args[5:])) != tuple(node.args[5:]):
            raise QuantizationError(
                f"{layer_of(node)}: one batch norm is applied with two different settings",
                "give each its own nn.BatchNorm2d, so that its eps and momentum can be restored after PT2E's rewriting",
            )
    return literals


def restore_batch_norms(graph: Graph, literals: dict[Tensors, tuple[Any, ...]]) -> None:
    """Restores the float model's settings in every batch norm, and in the scale factor of every folded one.

    Raises:
        QuantizationError: a part that PT2E rewrote is not recognized, so that a literal of PT2E would stay.
    """
    for node in batch_norms(graph):
        if batch_norm_tensors(node) not in literals:
            raise _not_restorable(layer_of(node))
        node.args = (*node.args[:5], *literals[batch_norm_tensors(node)])
    restored = set()
    for folded in folded_batch_norms(graph):
        folded.eps.args = (folded.eps.args[0], folded.batch_norm.args[7])
        restored.add(folded.eps)
    for variance in {tensors[3] for tensors in literals}:
        for node in graph.find_nodes(op="get_attr"):
            if node.target == variance and any(
                _is(user, aten.add.Tensor) and user not in restored for user in node.users
            ):
                raise _not_restorable(str(variance).removesuffix(".running_var"))


def _not_restorable(layer: str) -> QuantizationError:
    return QuantizationError(
        f"{layer}: PT2E rewrote this batch norm in a way that is not recognized; "
        "its eps and momentum cannot be restored",
        "place the batch norm directly after its convolution, "
        "or leave the convolution in floating point with a rule of qat.rules",
    )


def folded_batch_norms(graph: Graph) -> list[FoldedBatchNorm]:
    """Finds the convolutions into which prepare_qat_pt2e folded a batch norm, in graph order."""
    return [folded for node in batch_norms(graph) if (folded := _folded(node)) is not None]


def _folded(batch_norm: Node) -> FoldedBatchNorm | None:
    output: Any = batch_norm.args[0]  # Any: nodes unlike the pattern are found by comparing targets
    if _is(output, aten.add.Tensor) and _is(output.args[0], aten.div.Tensor, *CONVOLUTIONS):
        output = output.args[0]  # a convolution with a bias: added after the division
    convolution: Any = output.args[0] if _is(output, aten.div.Tensor) else output
    if not _is(convolution, *CONVOLUTIONS):
        return None
    unscaling = output if output is not convolution else convolution.args[1]
    if not _is(unscaling, aten.div.Tensor) or not _is(unscaling.args[1], aten.reshape.default):
        return None
    scale_factor = unscaling.args[1].args[0]
    if not _is(scale_factor, aten.div.Tensor):
        return None
    eps = scale_factor.args[1].args[0]
    weight = unscaling.args[0] if output is convolution else convolution.args[1]
    scaled_weight = weight.args[0] if weight.op == "call_module" else weight
    if not _is(eps, aten.add.Tensor) or eps.args[0].target != batch_norm_tensors(batch_norm)[3]:
        return None
    return FoldedBatchNorm(eps, scale_factor, scaled_weight, convolution, unscaling, batch_norm)


def _is(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def undo_needless_folding(graph: Graph) -> None:
    """Undoes folding where the convolution stays in floating point: PT2E folds these batch norms too."""
    for folded in folded_batch_norms(graph):
        if not folded.quantized:
            convolution = folded.convolution
            convolution.args = (convolution.args[0], folded.scaled_weight.args[0], folded.bias, *convolution.args[3:])
            folded.batch_norm.args = (convolution, *folded.batch_norm.args[1:])
    graph.eliminate_dead_code()


def divide_weights(graph: Graph) -> None:
    """Divides the quantized weight of each folded convolution by the scale factor, instead of the convolution's output.

    Both are equal up to rounding, as a convolution is linear in its weight. The output has many times more elements
    than the weight, and the backward of its division has a reduction over all of them.
    """
    for folded in folded_batch_norms(graph):
        convolution, output = folded.convolution, folded.unscaling
        if output is convolution.args[1]:
            continue
        factor: Any = folded.scaled_weight.args[1]  # shaped like the weight
        with graph.inserting_before(convolution):
            weight = graph.call_function(aten.div.Tensor, (folded.weight, factor))
        weight.meta = dict(folded.scaled_weight.meta)
        convolution.args = (convolution.args[0], weight, *convolution.args[2:])
        output.replace_all_uses_with(convolution)
        graph.erase_node(output)
    graph.eliminate_dead_code()


def fold_batch_norms(module: GraphModule) -> None:
    """Folds each batch norm into parameters of its convolution, before convert.

    torchao would fold with eps 1e-5 whatever the model has, in other arithmetic than training, and once for each call
    of a layer. Here the weight is bitwise the input of the fake-quantize module.
    """
    graph = module.graph
    for index, folded in enumerate(folded_batch_norms(graph)):
        convolution, bias = folded.convolution, folded.bias
        scale_factor = constant(module, folded.scale_factor)
        _, beta, mean, _ = (constant(module, node) for node in folded.batch_norm.args[1:5] if isinstance(node, Node))
        offset = -mean if bias is None else constant(module, bias) - mean
        values = {"weight": constant(module, folded.scaled_weight), "bias": offset * scale_factor + beta}
        nodes = {}
        for kind, value in values.items():
            module.register_parameter(f"folded_{index}_{kind}", nn.Parameter(value, requires_grad=False))
            with graph.inserting_before(convolution if kind == "bias" else folded.eps):
                nodes[kind] = graph.get_attr(f"folded_{index}_{kind}")
            nodes[kind].meta = dict(folded.scaled_weight.meta)
        nodes["bias"].meta.pop("val", None)
        folded.scaled_weight.replace_all_uses_with(nodes["weight"])
        convolution.args = (convolution.args[0], folded.weight, nodes["bias"], *convolution.args[3:])
        folded.batch_norm.replace_all_uses_with(convolution)
    graph.eliminate_dead_code()
    module.recompile()


def fold_weight_norms(module: GraphModule) -> None:
    """Computes the batch norms that standardize weights, before convert, which would try to match each of them."""
    fixed = computed_from_parameters(module.graph)
    norms = module.graph.find_nodes(op="call_function", target=BATCH_NORM)
    for index, node in enumerate([node for node in norms if node in fixed]):
        name = f"folded_norm_{index}"
        module.register_parameter(name, nn.Parameter(constant(module, node), requires_grad=False))
        with module.graph.inserting_before(node):
            folded = module.graph.get_attr(name)
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
    module.graph.eliminate_dead_code()
    module.recompile()


def attribute(module: nn.Module, target: str) -> Tensor:
    """Returns the tensor at a dotted name, as a get_attr node reads it."""
    owner, _, name = target.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def constant(module: nn.Module, node: Node) -> Tensor:
    """Computes a node that depends on parameters and buffers only, such as a weight with a batch norm folded in."""
    value = _value(module, node)
    assert isinstance(value, Tensor)
    return value


def _value(module: nn.Module, node: Node) -> Any:
    """As `constant`, also of nodes inside the computation, such as the two values of var_mean."""
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    assert node.op == "call_function" and callable(node.target), f"{node} is not a constant"
    args = map_arg(node.args, lambda argument: _value(module, argument))
    kwargs = map_arg(node.kwargs, lambda argument: _value(module, argument))
    return node.target(*args, **kwargs)


def batch_norm_name(node: Node) -> str | None:
    """Returns the name of the module whose running statistics a batch norm reads; None where it reads none."""
    variance = batch_norm_tensors(node)[3]
    return None if variance is None else variance.rpartition(".")[0]


def use_batch_statistics(graph: Graph, settled: Collection[str], momentum: float | None = None) -> None:
    """Makes batch norms normalize by their batch and update their running statistics, for training.

    Args:
        settled: names of batch norms to leave unchanged.
        momentum: None for each batch norm's own.
    """
    for node in batch_norms(graph):
        if node.args[4] is not None and batch_norm_name(node) not in settled:
            node.args = (*node.args[:5], True, node.args[6] if momentum is None else momentum, *node.args[7:])


def use_dropout(graph: Graph) -> None:
    """Turns all dropouts on, for training."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in DROPOUTS:
            node.args = (*node.args[:2], True)
