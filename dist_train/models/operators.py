"""Operators of other libraries that a forward calls: a program that is exported holds torch's own alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

# Those that programs hold, and those that leave nothing in one.
_TORCH = frozenset({"aten", "prim", "prims", "quantized_decomposed", "profiler"})


class ForeignOperators(TorchDispatchMode):
    """A context in which calls of operators outside torch's own namespaces are noted.

    Attributes:
        found: the operators, as `torchvision::deform_conv2d`, each with the layer that called it first; "" for the
            model itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._modules = ModuleTracker()

    def __enter__(self) -> ForeignOperators:
        self._modules.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modules.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        # A number, such as the version that torchvision asks for, becomes a constant of a program.
        if func.namespace not in _TORCH and any(isinstance(each, Tensor) for each in tree_leaves(results)):
            layer = max(self._modules.parents, key=len).partition(".")[2]  # the first part is the model's class
            self.found.setdefault(f"{func.namespace}::{func._opname}", layer)
        return results
