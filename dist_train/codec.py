"""Nested Python state to tensors and JSON and back, without pickle; keeps what safetensors and JSON alone would lose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from dist_train.errors import CheckpointError


def encode(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Splits nested state into a JSON tree and flat contiguous tensors.

    Kept: strides (so channels_last stays), tensors that are the same memory, non-string keys, tuples, Counters, inf and nan, bytes.

    Raises:
        CheckpointError: something else than dict, list, tuple, tensor, number, string, bytes, bool or None; it says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    known: dict[tuple[Any, ...], str] = {}
    alive: list[torch.Tensor] = []  # while it is referred to, no other tensor can have its address

    def tensor(item: torch.Tensor, path: str) -> dict[str, Any]:
        item = item.detach()
        if item.layout != torch.strided or item.is_quantized:
            raise CheckpointError(f"{path} is a {item.layout} tensor of {item.dtype}, which a checkpoint cannot hold", "return its dense parts from state_dict()")
        if not _dense(item):
            item = item.contiguous()
        alive.append(item)
        identity = (item.data_ptr(), tuple(item.shape), item.stride(), item.dtype)
        name = known.get(identity) if item.numel() else None
        if name is None:
            name = known[identity] = path
            flat = item.as_strided((item.numel(),), (1,))
            tensors[name] = flat.cpu()
        return {"$tensor": name, "shape": list(item.shape), "stride": list(item.stride())}

    def walk(item: Any, path: str) -> Any:
        if item is None or isinstance(item, (bool, int, str)):
            return item
        if isinstance(item, float):
            return item if math.isfinite(item) else {"$float": repr(item)}
        if isinstance(item, torch.Tensor):
            return tensor(item, path)
        if isinstance(item, bytes):
            return {"$bytes": walk(torch.frombuffer(bytearray(item), dtype=torch.uint8) if item else torch.empty(0, dtype=torch.uint8), path)}
        if isinstance(item, (list, tuple)):
            items = [walk(each, f"{path}.{index}") for index, each in enumerate(item)]
            return {"$tuple": items} if isinstance(item, tuple) else items
        if isinstance(item, Counter):
            return {"$counter": [[walk(k, f"{path}.key"), walk(v, f"{path}.{k}")] for k, v in item.items()]}
        if isinstance(item, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in item):
                return {key: walk(each, f"{path}.{key}") for key, each in item.items()}
            return {"$dict": [[walk(k, f"{path}.key"), walk(v, f"{path}.{k}")] for k, v in item.items()]}
        raise CheckpointError(f"{path} is a {type(item).__module__}.{type(item).__qualname__}, which a checkpoint cannot hold", "keep numbers, strings, tensors, lists and dicts in state_dict()")

    return walk(value, "state"), tensors


def decode(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `encode`. Tensors that were one memory are one again."""
    built: dict[tuple[Any, ...], torch.Tensor] = {}

    def tensor(item: dict[str, Any]) -> torch.Tensor:
        identity = (item["$tensor"], tuple(item["shape"]), tuple(item["stride"]))
        if identity not in built:
            flat = tensors[item["$tensor"]]
            built[identity] = flat.as_strided(item["shape"], item["stride"]) if flat.numel() else flat.reshape(item["shape"])
        return built[identity]

    def walk(item: Any) -> Any:
        if isinstance(item, list):
            return [walk(each) for each in item]
        if not isinstance(item, dict):
            return item
        if "$tensor" in item:
            return tensor(item)
        if "$float" in item:
            return float(item["$float"])
        if "$bytes" in item:
            return walk(item["$bytes"]).numpy().tobytes()
        if "$tuple" in item:
            return tuple(walk(each) for each in item["$tuple"])
        if "$counter" in item:
            return Counter({walk(k): walk(v) for k, v in item["$counter"]})
        if "$dict" in item:
            return {walk(k): walk(v) for k, v in item["$dict"]}
        return {key: walk(each) for key, each in item.items()}

    return walk(tree)


def _dense(tensor: torch.Tensor) -> bool:
    """Does the tensor cover a block of memory without gaps or overlaps, in whatever order of dimensions?"""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
