"""Nested Python state to tensors and JSON and back, without pickle; keeps what safetensors and JSON alone would lose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from dist_train.errors import CheckpointError

# What safetensors can hold.
_DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        *(
            "bool",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
            "int8",
            "int16",
            "int32",
            "int64",
            "float16",
            "bfloat16",
            "float32",
            "float64",
        ),
        *("complex64", "float8_e4m3fn", "float8_e5m2"),
    )
)


def encode(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Splits nested state into a JSON tree and flat contiguous tensors.

    Kept: strides (so channels_last stays), tensors that are one block of memory (also in different shapes, such as a transpose),
    non-string keys, tuples, Counters, inf and nan, bytes. Not kept: that two tensors overlap only partly (each keeps its values),
    gaps in memory, kinds of mappings besides Counter, and attributes of a dict such as a state_dict's `_metadata`.

    Raises:
        CheckpointError: something else than dict, list, tuple, tensor, number, string, bytes, bool or None; it says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    known: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    alive: list[torch.Tensor] = []  # while it is referred to, no other tensor can have its address

    def tensor(item: torch.Tensor, path: str) -> dict[str, Any]:
        item = item.detach()
        if type(item) is not torch.Tensor or item.layout != torch.strided or item.is_meta or item.dtype not in _DTYPES:
            kind = f"{type(item).__name__} on {item.device} with layout {item.layout} and dtype {item.dtype}"
            raise CheckpointError(
                f"{path} is a {kind}, which a checkpoint cannot hold", "return its dense parts from state_dict()"
            )
        # A conjugate or negative view holds the values of something else.
        item = item.resolve_conj().resolve_neg()
        if not _dense(item):
            item = item.contiguous()
        alive.append(item)
        identity = (item.device, item.data_ptr(), item.numel(), item.dtype)
        name = known.get(identity) if item.numel() else None
        if name is None:
            name = path.encode(errors="backslashreplace").decode()  # safetensors takes no lone surrogates
            while name in tensors:  # {"a.b": ...} and {"a": {"b": ...}} have one path
                name += "'"
            known[identity] = name
            flat = item.as_strided((item.numel(),), (1,))
            # safetensors refuses tensors that overlap.
            storage = (item.device, item.untyped_storage().data_ptr())
            tensors[name] = flat.cpu() if storage not in storages else flat.clone().cpu()
            storages.add(storage)
        return {"$tensor": name, "shape": list(item.shape), "stride": list(item.stride())}

    def walk(item: Any, path: str) -> Any:
        if item is None or isinstance(item, (bool, int, str)):
            return item
        if isinstance(item, float):
            return item if math.isfinite(item) else {"$float": repr(item)}
        if isinstance(item, torch.Tensor):
            return tensor(item, path)
        if isinstance(item, bytes):
            return {
                "$bytes": walk(
                    torch.frombuffer(bytearray(item), dtype=torch.uint8) if item else torch.empty(0, dtype=torch.uint8),
                    path,
                )
            }
        if isinstance(item, (list, tuple)) and not hasattr(item, "_fields"):  # a namedtuple would come back as a tuple
            items = [walk(each, f"{path}.{index}") for index, each in enumerate(item)]
            return {"$tuple": items} if isinstance(item, tuple) else items
        if isinstance(item, Counter):
            return {"$counter": [[walk(k, f"{path}.key"), walk(v, f"{path}.{k}")] for k, v in item.items()]}
        if isinstance(item, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in item):
                return {key: walk(each, f"{path}.{key}") for key, each in item.items()}
            return {"$dict": [[walk(k, f"{path}.key"), walk(v, f"{path}.{k}")] for k, v in item.items()]}
        raise CheckpointError(
            f"{path} is a {type(item).__module__}.{type(item).__qualname__}, which a checkpoint cannot hold",
            "keep numbers, strings, tensors, lists and dicts in state_dict()",
        )

    return walk(value, "state"), tensors


def decode(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `encode`. Tensors that were one memory are one again."""
    built: dict[tuple[Any, ...], torch.Tensor] = {}

    def tensor(item: dict[str, Any]) -> torch.Tensor:
        identity = (item["$tensor"], tuple(item["shape"]), tuple(item["stride"]))
        if identity not in built:
            flat = tensors[item["$tensor"]]
            built[identity] = (
                flat.as_strided(item["shape"], item["stride"]) if flat.numel() else flat.reshape(item["shape"])
            )
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
