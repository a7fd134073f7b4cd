"""torchao's patterns of convolution and batch norm, exported once in a process: preparing exports all twelve anew each time."""

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
def patterns_exported_once() -> Iterator[None]:
    """In this context prepare_qat_pt2e takes its patterns from those that it made before; each time a copy."""
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
    """What a pattern is made of: its function is made anew in each call, over the convolution that it closes over."""
    function = pattern.fn  # of a WrapperModule
    closed_over = tuple(cell.cell_contents for cell in function.__closure__ or ())
    inputs = tuple((tuple(each.shape), each.dtype) for each in example_inputs)
    return (function.__code__, closed_over, inputs, is_cuda, torch.get_default_dtype())
