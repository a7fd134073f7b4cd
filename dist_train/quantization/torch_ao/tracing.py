"""Symbolic tracing of a float model into a GraphModule that torch.ao can prepare for training."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Container, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.errors import QuantizationError
from dist_train.quantization.batch_norm_calls import batch_norm_call, has_own_forward
from dist_train.quantization.error_location import cannot_trace
from dist_train.quantization.torch_ao.sized_tracing import SizedTracer

_ERRORS = (AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)  # of tracing a user's forward
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_IN_PLACE = {name for name in dir(operator) if name.startswith("i") and f"__{name}__" in dir(operator)} | {"setitem"}
_TENSORS = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        graph: shares the float model's tensors.
        renamed: from names at the top of `graph` to the float model's, where a GraphModule needs the name itself.
    """

    graph: GraphModule
    renamed: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, example: Tensor) -> Traced:
    """Traces `model`, which is in evaluation mode and is changed. Sizes become numbers only where it needs them.

    Subclasses of BatchNorm that end in F.batch_norm of their own tensors become a BatchNorm and what is around it: only
    a BatchNorm module is folded, and normalizes by its batch in training.

    Raises:
        QuantizationError: torch.fx cannot trace the model, or a BatchNorm computes something else.
    """
    _use_plain_batch_norms(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and has_own_forward(module):
            # It branches on its input, so that super().forward() could not be traced.
            module._check_input_dim = lambda input: None  # type: ignore[method-assign]
    tracer: _Tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except _ERRORS:
        tracer = _SizedTracer(model, example)
        try:
            graph = tracer.trace(model)
        except _ERRORS as error:
            raise cannot_trace("torch.fx", model, error, "branches", "pt2e") from error
        _drop_moves(graph)
    _split_batch_norms(model, graph, tracer.own_norms)
    graph.eliminate_dead_code(lambda node: _has_effect(node, model))  # an unread output has no layer to be named after
    renamed = _rename_taken(model, graph)
    return Traced(GraphModule(model, graph, type(model).__name__), renamed)


class _Tracer(Tracer):
    """Traces through modules that are not torch's, and records the batch norms among them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.own_norms = set[str]()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(m, _BatchNorm) and has_own_forward(m):
            self.own_norms.add(self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)


class _SizedTracer(_Tracer, SizedTracer):
    pass


def _drop_moves(graph: Graph) -> None:
    """Removes `x.to(device)`, in place: the whole model is on one device, and is converted on another one."""
    for node in graph.find_nodes(op="call_method", target="to"):
        if len(node.args) == 2 and isinstance(node.args[1], torch.device) and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _use_plain_batch_norms(model: nn.Module) -> None:
    """Replaces subclasses of BatchNorm without a forward of their own, in place: torch.ao folds by exact class."""
    made = dict[int, nn.Module]()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _BatchNorm) or has_own_forward(module) or not name:
            continue
        kind = _kind(module)
        if kind is not None and type(module) is not kind and not type(module).__module__.startswith("torch."):
            model.set_submodule(name, made.setdefault(id(module), _plain(module, kind)))


def _split_batch_norms(model: nn.Module, graph: Graph, own: Set[str]) -> None:
    """Replaces F.batch_norm of a BatchNorm's own tensors by a call of a new BatchNorm `<name>.<free name>`, in place.

    Args:
        own: names of the batch norms with a forward of their own that the model calls.

    Raises:
        QuantizationError: a BatchNorm with a forward of its own computes something else.
    """
    # `x.dim() == 4`, for example: a second reader would keep a convolution from being folded.
    for node in graph.find_nodes(op="call_function", target=torch._assert):
        graph.erase_node(node)
    new = dict[str, str]()
    for node in graph.find_nodes(op="call_function", target=F.batch_norm):
        call = batch_norm_call(node.args, node.kwargs)
        owner = _owner(call)
        module = None if owner is None else model.get_submodule(owner)
        kind = _kind(module)
        if owner is None or kind is None or call["training"] or call["eps"] != module.eps:  # type: ignore[union-attr]
            continue
        assert isinstance(module, _BatchNorm)
        if owner not in new:
            new[owner] = _free_name("norm", dir(module))
            module.add_module(new[owner], _plain(module, kind))
        with graph.inserting_before(node):
            called = graph.call_module(f"{owner}.{new[owner]}", (call["input"],))
        node.replace_all_uses_with(called)
        graph.erase_node(node)
        _drop_identities(model, called, owner)
    for name in sorted(own - new.keys()):
        raise QuantizationError(
            f"{name or 'the model'} is a {type(model.get_submodule(name)).__name__}, a subclass of BatchNorm whose "
            "forward is its own: the fx backend can fold only F.batch_norm of the module's tensors, with its eps",
            "let its forward call F.batch_norm and do the rest around it, or use nn.BatchNorm2d; where its "
            "statistics never change, torchvision.ops.FrozenBatchNorm2d; or --qat.backend pt2e",
        )


def _has_effect(node: Node, model: nn.Module) -> bool:
    """Tells whether a node may do more than return a value, as operations in place do."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "get_attr":
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or name in _IN_PLACE or "out" in node.kwargs
    return in_place or any(each is True for each in (*node.args, *node.kwargs.values())) or node.is_impure()


def _owner(call: dict[str, Any]) -> str | None:
    """Returns the name of the module whose tensors a call of F.batch_norm reads; None where they are of several."""
    read = [call[kind] for kind in _TENSORS]
    if not all(isinstance(each, Node) and each.op == "get_attr" for each in read):
        return None
    owner = str(read[0].target).rpartition(".")[0]
    return owner if [str(each.target) for each in read] == [f"{owner}.{kind}" for kind in _TENSORS] and owner else None


def _kind(norm: nn.Module | None) -> type[_BatchNorm] | None:
    return next((kind for kind in _KINDS if isinstance(norm, kind)), None)


def _plain(norm: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    """Makes a BatchNorm on the tensors of `norm`."""
    made = kind(norm.num_features, norm.eps, norm.momentum, device="meta")
    for name, parameter in norm.named_parameters(recurse=False):
        made.register_parameter(name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        made.register_buffer(name, buffer)
    return made.train(norm.training)


def _drop_identities(model: nn.Module, norm: Node, owner: str) -> None:
    """Removes the owner's nn.Identity modules behind `norm`: a ReLU behind them is fused with the convolution."""
    while [node.op for node in norm.users] == ["call_module"]:
        reader = next(iter(norm.users))
        target = str(reader.target)
        if not target.startswith(f"{owner}.") or type(model.get_submodule(target)) is not nn.Identity:
            return
        reader.replace_all_uses_with(norm)
        norm.graph.erase_node(reader)


def _rename_taken(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Renames what the model names as a GraphModule names its own, `code` for example. Returns old names by new."""
    taken = {*dir(GraphModule(nn.Module(), Graph())), "quantizers"}
    new = dict[str, str]()
    for node in graph.nodes:
        top, _, rest = str(node.target).partition(".")
        if node.op not in ("call_module", "get_attr") or top not in taken:
            continue
        if top not in new:
            new[top] = _free_name(f"{top}_of_model", {*taken, *dir(model)})
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


def _free_name(name: str, taken: Container[str]) -> str:
    counted = (f"{name}_{count}" for count in itertools.count(1))
    return next(each for each in itertools.chain([name], counted) if each not in taken)
