"""Symbolic tracing with sizes in numbers: branches on shapes, and arithmetic with them, are decided while tracing."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy, Tracer
from torch.fx.node import map_arg

from dist_train.quantization.dry_run import FAILURES

# Rows of the batches whose sizes are followed. What differs between them depends on the batch and stays symbolic.
_BATCHES = (1, 2, 5)
_OPERATORS = {value for name, value in vars(operator).items() if callable(value) and not name.startswith("_")}
_UNKNOWN = object()


class SizedTracer(Tracer):
    """Tracer that knows the sizes and dtypes of all values, for a model in evaluation mode.

    Each node is computed without data (on the device "meta") for batches of several sizes. A size that is equal in all
    is a number; another one, and what is computed from it, is a node. A branch on the values of data is still an error.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Tensor], varying: Mapping[str, Sequence[int]]) -> None:
        """
        Args:
            example: by argument of the model's forward.
            varying: dimensions that vary besides the batch, by argument.
        """
        super().__init__()
        self._model, self._example, self._varying = copy.deepcopy(model).to("meta"), example, varying
        self._values = dict[Node, tuple[Any, ...]]()
        self._computing = False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: Node) -> Proxy:
        return SizedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind == "call_method" and target in ("size", "dim", "ndimension") and isinstance(args[0], Proxy):
            known = self._sizes(args[0], target, *args[1:], **kwargs)
            if known is not _UNKNOWN:
                return known
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        values = self._computed(proxy.node)
        if values is None:
            return proxy
        numbers = not any(isinstance(value, Tensor) for value in values)
        if numbers and kind == "call_function" and target in _OPERATORS and _equal(values):
            self.graph.erase_node(proxy.node)
            return values[0]
        self._values[proxy.node] = values
        return proxy

    def to_bool(self, obj: Proxy) -> bool:
        values = self._values.get(obj.node)
        if values is not None and all(isinstance(value, (bool, int)) for value in values) and _equal(values):
            return bool(values[0])
        return super().to_bool(obj)

    def attribute(self, proxy: Proxy, name: str) -> Any:
        """Returns shape, ndim, dtype or device of a proxy's tensor; a Proxy for each size that the batch determines."""
        values = self._values.get(proxy.node)
        if values is None or not all(isinstance(value, Tensor) for value in values):
            return _UNKNOWN
        if name == "device":
            return next(iter(self._example.values())).device
        if name == "dtype":
            return values[0].dtype
        return self._sizes(proxy, "dim" if name == "ndim" else "size")

    def _sizes(self, proxy: Proxy, target: str, dim: int | None = None) -> Any:
        values = self._values.get(proxy.node)
        if values is None or not all(isinstance(value, Tensor) for value in values):
            return _UNKNOWN
        if not _equal([value.dim() for value in values]):
            return _UNKNOWN
        if target != "size":
            return values[0].dim()
        if dim is None:
            return Sizes(self._size(proxy, index) for index in range(values[0].dim()))
        return self._size(proxy, dim)

    def _size(self, proxy: Proxy, dim: int) -> Any:
        sizes = tuple(value.size(dim) for value in self._values[proxy.node])
        if _equal(sizes):
            return sizes[0]
        size = super().create_proxy("call_method", "size", (proxy, dim), {})
        self._values[size.node] = sizes
        return size

    def _computed(self, node: Node) -> tuple[Any, ...] | None:
        """Computes a node for each batch; None where that is not possible, or an input is not known."""
        if node.op == "placeholder":
            name = str(node.target)
            return tuple(self._sized(name, place) for place in range(len(_BATCHES))) if name in self._example else None
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in self._values:  # torch.fx makes it for an argument, unasked
                values = self._computed(source)
                if values is not None:
                    self._values[source] = values
        if any(source not in self._values for source in node.all_input_nodes) or node.op == "output":
            return None
        self._computing = True
        try:
            with torch.no_grad():
                return tuple(self._run(node, index) for index in range(len(_BATCHES)))
        except FAILURES:
            return None
        finally:
            self._computing = False

    def _sized(self, name: str, place: int) -> Tensor:
        """Returns an input without data, of the sizes at this place among those that are followed."""
        given = self._example[name]
        sizes = [_BATCHES[place], *given.shape[1:]]
        for dim in self._varying[name]:
            sizes[dim] += place
        return given.new_empty(sizes, device="meta")

    def _run(self, node: Node, index: int) -> Any:
        if node.op == "get_attr":
            value: Any = self.root
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value.to("meta")
        args = map_arg(node.args, lambda source: self._values[source][index])
        kwargs = dict(map_arg(node.kwargs, lambda source: self._values[source][index]))
        if node.op == "call_module":
            return self._model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


class SizedProxy(Proxy):
    """Proxy of a value whose sizes are known."""

    tracer: SizedTracer

    def __getattr__(self, k: str) -> Any:
        known = self.tracer.attribute(self, k) if k in ("shape", "ndim", "dtype", "device") else _UNKNOWN
        return super().__getattr__(k) if known is _UNKNOWN else known

    def __len__(self) -> int:
        shape = self.tracer.attribute(self, "shape")
        known = shape is not _UNKNOWN and bool(shape) and isinstance(shape[0], int)
        return shape[0] if known else super().__len__()


class Sizes(tuple[Any, ...]):
    """Shape of a traced tensor: numbers, and proxies for what the batch determines."""

    __slots__ = ()

    def numel(self) -> Any:
        """Returns the number of elements, as torch.Size does."""
        return math.prod(self)


def _equal(values: Any) -> bool:
    return all(type(value) is type(values[0]) and value == values[0] for value in values)
