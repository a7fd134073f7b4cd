"""Estimates what compiling a model costs, and what it saves in each step.

The estimate is made of counts alone. A time that is measured would depend on what else a machine does, and so would the
bytes of a run's results. benchmarks/compile_costs.py measured the constants.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train import trees
from dist_train.trees import Tree

# Operators with kernels of their own, which compiled code calls, too. All others it fuses.
_LIBRARY = ("convolution", "mm", "linear", "attention")
# Seconds of forward and backward that fusing saves for each element that an operator of the forward writes: on the CPU
# for one thread (0.3 to 0.5e-9 for float models, 0.5 to 0.8e-9 for fake quantization); on GPUs an assumption.
_SAVED_AN_ELEMENT = {"cpu": 4e-10, "cuda": 4e-12}
# Seconds for each operator itself: the interpreter's, and on GPUs the launch of a kernel.
_SAVED_AN_OPERATOR = 2e-6
# Seconds of compiling a graph without a cache, of it and of each of its operators.
_GRAPH, _OPERATOR = 15.0, 0.05


@dataclass(frozen=True)
class Work:
    """The operators of a forward pass that compiled code fuses, in training mode.

    Attributes:
        operators: their number, with those that are not fused.
        per_row: elements that they write for each row of a batch.
        fixed: elements that they write whatever the batch, as those that quantize weights.
    """

    operators: int
    per_row: float
    fixed: int

    def saved_seconds(self, rows: int, device: str, threads: int) -> float:
        """Estimates the seconds that a compiled step of `rows` rows is faster."""
        elements = self.per_row * rows + self.fixed
        parallel = threads if device == "cpu" else 1
        each = _SAVED_AN_ELEMENT.get(device, _SAVED_AN_ELEMENT["cuda"])
        return elements * each / parallel + self.operators * _SAVED_AN_OPERATOR

    def compile_seconds(self, graphs: int) -> float:
        """Estimates the seconds until `graphs` graphs of this size are compiled, without a cache."""
        return graphs * (_GRAPH + _OPERATOR * self.operators)


class _Counter(TorchDispatchMode):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self.operators = self.of_rows = self.fixed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.is_view:
            return results
        self.operators += 1
        if any(name in func._opname for name in _LIBRARY):
            return results
        for each in tree_leaves(results):
            if isinstance(each, Tensor):
                if each.dim() and each.shape[0] == self._rows:
                    self.of_rows += each.numel()
                else:
                    self.fixed += each.numel()
        return results


def work_of(
    model: nn.Module, example: Tree, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Work:
    """Counts the work of a forward pass on `example` [B, ...] in training mode, without changing the model."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device, rows = trees.first_leaf(example).device, trees.rows_of(example)
    devices = [device] if device.type == "cuda" else []
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _Counter(rows) as counter, autocast():
            torch.func.functional_call(model, buffers, *trees.arguments(example))
    finally:
        for module, mode in modes:
            module.training = mode
    return Work(counter.operators, counter.of_rows / rows, counter.fixed)
