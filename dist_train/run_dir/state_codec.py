"""Converts nested Python state to tensors and JSON and back, without pickle.

It keeps details that safetensors and JSON alone would lose, see `encode`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from dist_train.errors import CheckpointError

# The dtypes of safetensors.
_INTEGERS = {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}
_DTYPES = {*_INTEGERS, *_FLOATS, torch.bool, torch.complex64}


def encode(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Splits nested state into a JSON tree and flat contiguous tensors.

    Kept are strides, so channels_last stays, and tensors that share a block of memory, also in different shapes. So
    are non-string keys, tuples, Counters, inf and nan, bytes.

    Not kept are the partial overlap of two tensors (each keeps its values) and gaps in memory. Nor are mapping types
    besides Counter, and attributes of a dict such as a state_dict's `_metadata`.

    Raises:
        CheckpointError: a value other than dict, list, tuple, tensor, number, string, bytes, bool or None; names it.
    """
    tensors: dict[str, torch.Tensor] = {}
    known: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    alive: list[torch.Tensor] = []  # while a tensor is referenced, no other one can have its address

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
    """Inverts `encode`; tensors that shared memory share it again."""
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
    """Tells if a tensor covers a block of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
