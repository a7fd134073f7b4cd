"""Converts nested Python state to tensors and JSON and back, without pickle.

It keeps details that safetensors and JSON alone would lose, see `encode`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dist_train.errors import CheckpointError
from dist_train.run_dir.shards import Shard, describe, in_shards, part_of
from dist_train.untrusted import BeyondLimits, last_element, parse_json, refuse_deep, refuse_long

# The dtypes of safetensors.
_INTEGERS = {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}
_DTYPES = {*_INTEGERS, *_FLOATS, torch.bool, torch.complex64}


def encode(
    value: Any, *, in_place: bool = False, shards: dict[str, Shard | None] | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Splits nested state into a JSON tree and flat contiguous tensors.

    The tensors are on the CPU and share no memory with each other, as safetensors wants them. With `in_place` they are
    on the devices of the state and are its own memory, where it is dense.

    Kept are strides, so channels_last stays, and tensors that share a block of memory, also in different shapes. So
    are non-string keys, tuples, Counters, inf and nan, bytes.

    Of DTensors the tree holds a description, and this rank's part goes to `shards`, on its device and in place.

    Not kept are the partial overlap of two tensors (each keeps its values) and gaps in memory. Nor are mapping types
    besides Counter, and attributes of a dict such as a state_dict's `_metadata`.

    Raises:
        CheckpointError: a value other than dict, list, tuple, tensor, number, string, bytes, bool or None; names it.
            Or more values outside of tensors than `parse` reads, or more levels.
    """
    tensors: dict[str, torch.Tensor] = {}
    known: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    alive: list[torch.Tensor] = []  # while a tensor is referenced, no other one can have its address

    def sharded(item: Any, path: str, into: dict[str, Shard | None]) -> dict[str, Any]:
        local = item.to_local()
        alive.append(local)
        # Parameters that are tied are one DTensor; parts without elements have no address, and are written nowhere.
        identity = ("shard", local.device, local.data_ptr(), local.numel(), local.dtype)
        name = known.get(identity) if local.numel() else None
        if name is None:
            name = _free_name(path, into)
            known[identity] = name
            into[name] = part_of(item, path)
        return {"$shards": name, **describe(item, path)}

    def tensor(item: torch.Tensor, path: str) -> dict[str, Any]:
        item = item.detach()
        if shards is not None and in_shards(item):
            return sharded(item, path, shards)
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
            name = _free_name(path, tensors)
            known[identity] = name
            flat = item.as_strided((item.numel(),), (1,))
            # safetensors refuses tensors that overlap.
            storage = (item.device, item.untyped_storage().data_ptr())
            if not in_place:
                flat = flat.cpu() if storage not in storages else flat.clone().cpu()
            tensors[name] = flat
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

    try:
        tree = walk(value, "state")
        refuse_deep([tree])  # as it lies in its file, beside the format
        refuse_long(json.dumps(tree).encode())
    except (BeyondLimits, RecursionError) as error:
        reason = "it is nested in too many levels" if isinstance(error, RecursionError) else error
        raise CheckpointError(
            f"a checkpoint cannot hold the state: {reason}", "keep long lists of numbers as tensors in state_dict()"
        ) from error
    return tree, tensors


def _free_name(path: str, taken: Mapping[str, object]) -> str:
    name = path.encode(errors="backslashreplace").decode()  # safetensors takes no lone surrogates
    while name in taken:  # {"a.b": ...} and {"a": {"b": ...}} have one path
        name += "'"
    return name


def parse(text: bytes) -> Any:
    """Returns the value in a JSON text that holds the tree of `encode`, by the limits of `untrusted.parse_json`.

    Raises:
        CheckpointError: it is no JSON, or beyond the limits.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise _damaged(f"it is no JSON, or not ours: {error}") from error


def decode(
    tree: Any, tensors: Mapping[str, torch.Tensor], joined: Callable[[Mapping[str, Any]], torch.Tensor] | None = None
) -> Any:
    """Inverts `encode`; tensors that shared memory share it again. Sizes are checked before a tensor is made.

    joined: makes a tensor from the description of a DTensor, which the tree has only if `encode` was given `shards`.

    Raises:
        CheckpointError: `encode` never makes such a tree with these tensors.
    """
    try:
        return _decode(tree, tensors, joined)
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(f"its tree does not fit its tensors: {error}") from error


def _damaged(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the state in a checkpoint is not what was written: {reason}",
        "restore it from a backup, or start anew with another --run.dir",
    )


def _decode(
    tree: Any, tensors: Mapping[str, torch.Tensor], joined: Callable[[Mapping[str, Any]], torch.Tensor] | None
) -> Any:
    built: dict[tuple[Any, ...], torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}

    def tensor(item: dict[str, Any]) -> torch.Tensor:
        name, shape, stride = item["$tensor"], item["shape"], item["stride"]
        identity = (name, tuple(shape), tuple(stride))
        if identity not in built:
            flat = tensors[name]
            # `encode` writes blocks of memory without gaps and overlaps, each as a whole.
            if flat.dim() != 1 or last_element(shape, stride) != flat.numel() or math.prod(shape) != flat.numel():
                raise ValueError(f"{name} has {flat.numel()} elements, not those of {shape} with strides {stride}")
            built[identity] = flat.as_strided(shape, stride) if flat.numel() else flat.reshape(shape)
        return built[identity]

    def walk(item: Any) -> Any:
        if isinstance(item, list):
            return [walk(each) for each in item]
        if not isinstance(item, dict):
            return item
        if "$tensor" in item:
            return tensor(item)
        if "$shards" in item:
            if joined is None:
                raise ValueError("it names shards, and has none")
            name = item["$shards"]
            if name not in whole:
                whole[name] = joined(item)
            return whole[name]
        if "$float" in item:
            return float(item["$float"])
        if "$bytes" in item:
            content = tensor(item["$bytes"])
            if content.dtype != torch.uint8:
                raise ValueError(f"bytes are kept as uint8, not {content.dtype}")
            return content.numpy().tobytes()
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
