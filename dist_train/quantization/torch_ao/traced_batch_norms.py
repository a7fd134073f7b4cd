"""Batch norms in a traced graph: plain modules of torch's, which torch.ao folds by their exact class."""

from __future__ import annotations

import itertools
from collections.abc import Container, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.errors import QuantizationError
from dist_train.quantization.batch_norm_calls import batch_norm_call, has_own_forward

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TENSORS = ("running_mean", "running_var", "weight", "bias")


def use_plain_batch_norms(model: nn.Module) -> None:
    """Replaces subclasses of BatchNorm without a forward of their own, in place: torch.ao folds by exact class."""
    made = dict[int, nn.Module]()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _BatchNorm) or has_own_forward(module) or not name:
            continue
        kind = _kind(module)
        if kind is not None and type(module) is not kind and not type(module).__module__.startswith("torch."):
            model.set_submodule(name, made.setdefault(id(module), _plain(module, kind)))


def split_batch_norms(model: nn.Module, graph: Graph, own: Set[str]) -> None:
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
            new[owner] = free_name("norm", dir(module))
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


def free_name(name: str, taken: Container[str]) -> str:
    """Returns `name`, with a number behind it where it is taken."""
    counted = (f"{name}_{count}" for count in itertools.count(1))
    return next(each for each in itertools.chain([name], counted) if each not in taken)


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
