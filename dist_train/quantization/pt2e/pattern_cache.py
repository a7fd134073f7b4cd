"""Cache of torchao's patterns of convolution and batch norm: each preparation would export all twelve again."""

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
    """Makes prepare_qat_pt2e copy its patterns from earlier ones inside the block."""
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
