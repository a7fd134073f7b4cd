"""Reads weights from files that other programs wrote, without running code from them."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_train.errors import DataError, first_line
from dist_train.models.weight_formats import AGAIN, SAVE, is_safetensors, refuse_other_formats

# Prefixes that wrappers put before every key.
_PREFIXES = ("module.", "_orig_mod.")
_AVERAGES = ("ema", "swa", "average", "teacher")  # parts of the names of moving averages
# Names by which programs save the weights of their one model.
_USUAL = {"state_dict", "model_state_dict", "model", "model_state", "net", "network", "module", "weights"}
_SHOWN = 8
# Damaged pickles raise these, too.
_UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)


class Weights(dict[str, Tensor]):
    """A state_dict out of a file.

    Attributes:
        notes: a line for each choice that was made in reading it.
    """

    notes: tuple[str, ...] = ()


class Unknown:
    """Stands for an object of a class that is not torch's, such as argparse.Namespace: nothing of it is kept or run."""

    kind = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Unknown:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def append(self, value: Any) -> None:
        return

    def extend(self, values: Any) -> None:
        return


def read_file(path: Path, key: str | None = None) -> Weights:
    """Reads the state_dict in a .safetensors file or a file of torch.save; it may lie beside other things.

    It is taken where there is one only. Objects of classes that are not torch's are skipped; no code is run.

    Args:
        key: name of the state_dict in the file, dotted where it is nested, or a prefix of its tensors' names.

    Raises:
        DataError: the file cannot be read, holds no state_dict or several, or has none of that key.
    """
    loaded = _load(path)
    if key is not None:
        return _plain(_at(path, loaded, key))
    found = _without_other_parts(_states(loaded))
    if not found:
        raise DataError(f"{path} holds no state_dict: {_content(loaded)}", _remedy(path, loaded))
    if len(found) > 1:
        names = [
            f"{name} ({len(state)} tensors{', a moving average' if _averaged(name) else ''})"
            for name, state in found.items()
        ]
        raise DataError(
            f"{path} holds several sets of weights: {', '.join(names[:_SHOWN])}",
            "name one: " + ", or ".join(f"--model.weights_key {name}" for name in list(found)[:_SHOWN]),
        )
    ((name, state),) = found.items()
    weights = _plain(state)
    others = [other for other in _states(loaded, 3) if other != name]
    if name and (name not in _USUAL or others):
        left = f", {', '.join(others[:_SHOWN])} left out" if others else ""
        weights.notes = (f"of what it holds, {name} was taken{left}",)
    return weights


def _load(path: Path) -> Any:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"cannot read weights from {path}: {error.strerror or error}", "check the path") from error
    refuse_other_formats(path, head)
    try:
        if is_safetensors(head):
            return _load_safetensors(path, head, size)
        return _load_pickled(path)
    except _UNREADABLE as error:
        raise DataError(
            f"cannot read weights from {path}: {_reason(error)}", f"{AGAIN}, or save a state_dict alone: {SAVE}"
        ) from error


def _reason(error: Exception) -> str:
    """Returns what is wrong with a file, without torch's advice to trust it."""
    text = str(error)
    if "Invalid magic number" in text:
        return "it is a pickle of another program"
    if "unrecognized function" in text or "is blocked" in text:
        return "reading it would run code of its own"
    return first_line(text.rpartition("WeightsUnpickler error:")[2] or type(error).__name__)


def _load_safetensors(path: Path, head: bytes, size: int) -> dict[str, Tensor]:
    length = int.from_bytes(head[:8], "little")
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length)
    if len(header) == length:
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max((value["data_offsets"][1] for value in tensors), default=0)
    else:
        expected = 8 + length
    if size < expected:
        raise DataError(f"{path} is truncated: it has {size} bytes, and its header says {expected}", AGAIN)
    return load_file(path)


def _load_pickled(path: Path) -> Any:
    """Reads a file of torch.save by torch's reader of plain data; other classes than its own are replaced by stubs.

    torch lists the classes in a zip archive; in files of torch before 1.6 it refuses one after the other.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise DataError(f"{path} is damaged: the checksum of {damaged} in it is another", AGAIN)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    while True:
        stubs: list[Any] = [(type("Unknown", (Unknown,), {"kind": name}), name) for name in unknown]
        try:
            # As an open file, because torch decides by a path's suffix.
            with torch.serialization.safe_globals(stubs), path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            # torch leaves out the module of what is built in.
            name = None if refused is None else refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if name is None or name in unknown:
                raise
            unknown.append(name)


def _is_state(value: Any) -> bool:
    """Tells whether a value is a state_dict. Modules may add an extra state, which is anything."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(each, Tensor) for each in value.values())
        and all(
            isinstance(name, str) and (isinstance(each, Tensor) or name.endswith("_extra_state"))
            for name, each in value.items()
        )
    )


def _states(loaded: Any, depth: int = 2) -> dict[str, Mapping[str, Any]]:
    """Returns the state_dicts of a file by their dotted keys; the key of the file itself is empty."""
    if _is_state(loaded):
        return {"": loaded}
    if not isinstance(loaded, Mapping) or not depth or _is_optimizer(loaded):
        return {}
    return {
        f"{name}.{inner}".rstrip("."): state
        for name, value in loaded.items()
        if isinstance(name, str)
        for inner, state in _states(value, depth - 1).items()
    }


def _without_other_parts(states: dict[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Leaves out the tensors of a loss, a callback, ..., if one state_dict has a usual name and none is an average."""
    usual = {name: state for name, state in states.items() if name in _USUAL}
    return usual if len(usual) == 1 and not any(_averaged(name) for name in states) else states


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and "param_groups" in value


def _averaged(name: str) -> bool:
    return any(part in name.lower() for part in _AVERAGES)


def _plain(state: Mapping[str, Any]) -> Weights:
    weights = Weights({name: value for name, value in state.items() if isinstance(value, Tensor)})
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = Weights({name.removeprefix(prefix): value for name, value in weights.items()})
    return weights


def _at(path: Path, loaded: Any, key: str) -> Mapping[str, Any]:
    if key in (states := _states(loaded, 4)):
        return states[key]
    beneath = {
        name.removeprefix(f"{key}."): value
        for state in states.values()
        for name, value in state.items()
        if name.startswith(f"{key}.")
    }
    if not beneath:
        known = ", ".join(filter(None, states)) or "none by name"
        raise DataError(
            f"{path} holds no state_dict {key}: {_content(loaded)}",
            f"name one of its state_dicts: {known}",
        )
    return beneath


def _content(loaded: Any) -> str:
    """Describes what a file holds: `it has epoch (int), optimizer (an optimizer's state)`."""
    if not isinstance(loaded, Mapping):
        return f"it is {_kind(loaded)}"
    keys = [f"{name} ({_kind(value)})" for name, value in list(loaded.items())[:_SHOWN]]
    more = f" and {len(loaded) - _SHOWN} more" if len(loaded) > _SHOWN else ""
    return f"it has {', '.join(keys)}{more}" if keys else "it is an empty dict"


def _kind(value: Any) -> str:
    if isinstance(value, Unknown):
        return f"an object of {value.kind}"
    if _is_optimizer(value):
        return "an optimizer's state"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if _is_state(value):
        return f"{len(value)} tensors"
    return f"{type(value).__name__}" if not isinstance(value, Mapping) else f"a dict of {len(value)}"


def _remedy(path: Path, loaded: Any) -> str:
    parts = loaded.values() if isinstance(loaded, Mapping) else [loaded]
    if any(isinstance(part, Unknown) and "argparse" not in part.kind for part in parts):
        return (
            "a whole model is code: where that is, and if you trust the file, "
            f"model = torch.load({path.name!r}, weights_only=False), then torch.save(model.state_dict(), FILE)"
        )
    return f"give the file that holds the weights: {SAVE}"
