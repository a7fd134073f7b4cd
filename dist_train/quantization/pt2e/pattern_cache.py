"""torchao's patterns of convolution and batch norm: only those of the model's convolutions, and each exported once.

prepare_qat_pt2e exports three patterns of each of four kinds of convolution, twelve in all, at each call. That takes
two seconds of a processor, on every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from dist_train.quantization.pt2e.torchao_parts import qat_utils

_Key = tuple[Any, ...]
_known: dict[_Key, GraphModule] = {}


@contextmanager
def few_patterns() -> Iterator[None]:
    """Makes prepare_qat_pt2e search for the convolutions that there are, and copy patterns from earlier ones."""
    with _of_known_convolutions(), _exported_once():
        yield


@contextmanager
def _of_known_convolutions() -> Iterator[None]:
    fuse: Callable[..., GraphModule] = qat_utils._fuse_conv_bn_qat_helper

    def known(module: GraphModule, conv_fn: Any, example_inputs: tuple[Tensor, ...], is_cuda: bool) -> GraphModule:
        if _calls(module, conv_fn):
            return fuse(module, conv_fn, example_inputs, is_cuda)
        module.graph.eliminate_dead_code()  # the part of `fuse` that does not ask for a match
        module.recompile()
        return module

    qat_utils._fuse_conv_bn_qat_helper = known
    try:
        yield
    finally:
        qat_utils._fuse_conv_bn_qat_helper = fuse


def _calls(module: GraphModule, conv_fn: Any) -> bool:
    """Tells whether the graph calls an operator of the function's name, F.conv2d for one: no other can match."""
    packet = getattr(torch.ops.aten, conv_fn.__name__)
    return any(getattr(node.target, "overloadpacket", None) is packet for node in module.graph.nodes)


@contextmanager
def _exported_once() -> Iterator[None]:
    export: Callable[..., GraphModule] = qat_utils._get_aten_graph_module_for_pattern

    def known(pattern: Any, example_inputs: tuple[Tensor, ...], is_cuda: bool = False, **kwargs: Any) -> GraphModule:
        if kwargs:
            return export(pattern, example_inputs, is_cuda, **kwargs)
        key = _key(pattern, example_inputs, is_cuda)
        if key not in _known:
            _known[key] = export(pattern, example_inputs, is_cuda)
        return copy.deepcopy(_known[key])

    qat_utils._get_aten_graph_module_for_pattern = known
    try:
        yield
    finally:
        qat_utils._get_aten_graph_module_for_pattern = export


def _key(pattern: Any, example_inputs: tuple[Tensor, ...], is_cuda: bool) -> _Key:
    """Identifies a pattern: torchao creates its function anew for each call, as a closure over the convolution."""
    function = pattern.fn  # of a WrapperModule
    closed_over = tuple(cell.cell_contents for cell in function.__closure__ or ())
    inputs = tuple((tuple(each.shape), each.dtype) for each in example_inputs)
    return (function.__code__, closed_over, inputs, is_cuda, torch.get_default_dtype())
