"""Symbolic tracing of a float model into a GraphModule that torch.ao can prepare for training."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train import trees
from dist_train.errors import QuantizationError
from dist_train.programs.signature import Dynamic
from dist_train.quantization.batch_norm_calls import has_own_forward
from dist_train.quantization.error_location import cannot_trace
from dist_train.quantization.torch_ao.sized_tracing import SizedTracer
from dist_train.quantization.torch_ao.traced_batch_norms import free_name, split_batch_norms, use_plain_batch_norms
from dist_train.trees import Tree

_ERRORS = (AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)  # of tracing a user's forward
_IN_PLACE = {name for name in dir(operator) if name.startswith("i") and f"__{name}__" in dir(operator)} | {"setitem"}


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        graph: shares the float model's tensors.
        renamed: from names at the top of `graph` to the float model's, where a GraphModule needs the name itself.
    """

    graph: GraphModule
    renamed: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, example: Tree, dynamic: Dynamic | None = None) -> Traced:
    """Traces `model`, which is in evaluation mode and is changed. Sizes become numbers only where it needs them.

    Subclasses of BatchNorm that end in F.batch_norm of their own tensors become a BatchNorm and what is around it: only
    a BatchNorm module is folded, and normalizes by its batch in training.

    Raises:
        QuantizationError: torch.fx cannot trace the model, or a BatchNorm computes something else.
    """
    use_plain_batch_norms(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and has_own_forward(module):
            # It branches on its input, so that super().forward() could not be traced.
            module._check_input_dim = lambda input: None  # type: ignore[method-assign]
    given = _by_argument(model, example)
    left_out = _left_out(model, given)
    tracer: _Tracer = _Tracer()
    try:
        graph = tracer.trace(model, left_out)
    except _ERRORS:
        tracer = _SizedTracer(model, given, _varying(example, given, dynamic))
        try:
            graph = tracer.trace(model, left_out)
        except _ERRORS as error:
            raise cannot_trace("torch.fx", model, error, "--qat.backend pt2e takes branches on sizes") from error
        _drop_moves(graph)
    _keep_inputs(graph, given)
    split_batch_norms(model, graph, tracer.own_norms)
    _read_facts(model, graph, example)
    graph.eliminate_dead_code(lambda node: _has_effect(node, model))  # an unread output has no layer to be named after
    renamed = _rename_taken(model, graph)
    return Traced(GraphModule(model, graph, type(model).__name__), renamed)


def by_position(graph: Graph, inputs: Tree) -> tuple[Any, ...]:
    """Returns a tree of inputs as arguments by position, in the order of a traced graph's inputs."""
    args, kwargs = trees.arguments(inputs)
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    return (*args, *(kwargs[name] for name in names[len(args) :]))


def _by_argument(model: nn.Module, example: Tree) -> dict[str, Tensor]:
    """Returns the tensors of an example by the names of the arguments of the model's forward.

    Raises:
        QuantizationError: an argument is no tensor but a tree.
    """
    args, kwargs = trees.arguments(example)
    found = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    for name, given in found.items():
        if not isinstance(given, Tensor):
            raise QuantizationError(
                f"the argument {name} of {type(model).__name__}.forward is a {type(given).__name__}: "
                "the fx backend takes tensors only, by keywords or by position",
                "--qat.backend pt2e",
            )
    return found


def _left_out(model: nn.Module, given: Container[str]) -> dict[str, Any] | None:
    """Returns the defaults of the arguments of forward that are not given; None where all are."""
    taken = inspect.signature(model.forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name: each.default for each in taken if each.kind in named and each.name not in given} or None


def _varying(example: Tree, given: Mapping[str, Tensor], dynamic: Dynamic | None) -> dict[str, Sequence[int]]:
    """Returns the dimensions that vary besides the batch, by argument."""
    names = {id(leaf): name for name, leaf in trees.named_leaves(example)}
    return {name: list((dynamic or {}).get(names[id(tensor)], {})) for name, tensor in given.items()}


def _keep_inputs(graph: Graph, given: Container[str]) -> None:
    """Removes the inputs for arguments that are not given, with torch.fx's assertions about them, in place."""
    for node in [each for each in graph.find_nodes(op="placeholder") if str(each.target) not in given]:
        for user in list(node.users):
            if user.target is _assert_is_none:
                graph.erase_node(user)
            elif all(reader.target is torch._assert for reader in user.users):
                for reader in list(user.users):
                    graph.erase_node(reader)
                graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


class _Tracer(Tracer):
    """Traces through modules that are not torch's, and records the batch norms among them.

    Raises:
        QuantizationError: an operation is under a torch.autocast of the model's own, of which a graph knows nothing.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.own_norms = set[str]()
        self._autocast = _autocast()

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> Node:
        if kind.startswith("call") and _autocast() != self._autocast:
            place = self.scope.module_path or type(self.root).__name__
            raise QuantizationError(
                f"{place}: torch.autocast in forward cannot be quantized by the fx backend",
                "leave autocast to `precision`",
            )
        return super().create_node(kind, *args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(m, _BatchNorm) and has_own_forward(m):
            self.own_norms.add(self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)


def _autocast() -> list[tuple[bool, torch.dtype]]:
    return [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]


class _SizedTracer(_Tracer, SizedTracer):
    pass


def _drop_moves(graph: Graph) -> None:
    """Removes `x.to(device)`, in place: the whole model is on one device, and is converted on another one."""
    for node in graph.find_nodes(op="call_method", target="to"):
        if len(node.args) == 2 and isinstance(node.args[1], torch.device) and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _read_facts(model: nn.Module, graph: Graph, example: Tree) -> None:
    """Replaces device, dtype and shape of parameters by the input's or by numbers, in place.

    A converted layer has no such parameter, and is on another device.
    """
    leaves = zip(graph.find_nodes(op="placeholder"), by_position(graph, example), strict=True)
    sources = {leaf.dtype: node for node, leaf in reversed(list(leaves))}
    source = next(iter(graph.nodes))
    for node in graph.find_nodes(op="call_function", target=getattr):
        owner, name = node.args[0], node.args[1]
        if not isinstance(owner, Node) or owner.op != "get_attr" or name not in ("device", "dtype", "shape", "ndim"):
            continue
        path, _, last = str(owner.target).rpartition(".")
        known = getattr(getattr(model.get_submodule(path), last), str(name))
        if name == "device" or (name == "dtype" and known in sources):
            node.replace_input_with(owner, source if name == "device" else sources[known])
        else:
            _put(node, known)
            graph.erase_node(node)


def _put(node: Node, value: object) -> None:
    """Makes the readers of a node read a value instead."""

    def known(each: Node) -> Any:
        return value if each is node else each

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, known), map_arg(user.kwargs, known)


def _has_effect(node: Node, model: nn.Module) -> bool:
    """Tells whether a node may do more than return a value, as operations in place do."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "get_attr":
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or name in _IN_PLACE or "out" in node.kwargs
    return in_place or any(each is True for each in (*node.args, *node.kwargs.values())) or node.is_impure()


def _rename_taken(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Renames what the model names as a GraphModule names its own, `code` for example. Returns old names by new."""
    taken = {*dir(GraphModule(nn.Module(), Graph())), "quantizers"}
    new = dict[str, str]()
    for node in graph.nodes:
        top, _, rest = str(node.target).partition(".")
        if node.op not in ("call_module", "get_attr") or top not in taken:
            continue
        if top not in new:
            new[top] = free_name(f"{top}_of_model", {*taken, *dir(model)})
            _add(model, new[top], getattr(model, top))
        node.target = f"{new[top]}.{rest}" if rest else new[top]
    return {here: name for name, here in new.items()}


def _add(model: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Module):
        model.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        model.register_parameter(name, value)
    else:
        model.register_buffer(name, value)
