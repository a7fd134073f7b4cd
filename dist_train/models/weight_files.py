"""Finds the weights in files that other programs wrote, among all that they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_train.errors import DataError
from dist_train.models.weight_formats import SAVE
from dist_train.models.weight_reader import Unknown, load_content

# Prefixes that wrappers put before every key.
_PREFIXES = ("module.", "_orig_mod.")
# Words in the names of moving averages: model_ema, swa_state_dict, ModelEMA; not semantic_head.
_AVERAGES = {"ema", "swa", "avg", "average", "averaged"}
_TEACHER = "teacher"  # an average of the student, or a network of its own
# Names by which programs save the weights of their one model.
_USUAL = {"state_dict", "model_state_dict", "model", "model_state", "net", "network", "module", "weights"}
_SHOWN = 8


class Weights(dict[str, Tensor]):
    """A state_dict out of a file.

    Attributes:
        notes: a line for each choice that was made in reading it.
        absent: names of the model's tensors that it does not have, and that keep their initial values.
    """

    notes: tuple[str, ...] = ()
    absent: frozenset[str] = frozenset()


def read_file(path: Path, key: str | None = None) -> Weights:
    """Reads the state_dict in a .safetensors file or a file of torch.save; it may lie beside other things.

    Of several, it is the moving average of the one beside it; else the one of a usual name among those of losses and
    callbacks. A note says what was taken. Objects of classes that are not torch's are skipped; no code is run.

    Args:
        key: name of the state_dict in the file, dotted where it is nested, or a prefix of its tensors' names.

    Raises:
        DataError: the file cannot be read, holds no state_dict or several, or has none of that key.
    """
    loaded = load_content(path)
    if key is not None:
        return _plain(_at(path, loaded, key))
    states = _states(loaded)
    if not states:
        raise DataError(f"{path} holds no state_dict: {_content(loaded)}", _remedy(path, loaded))
    average, averaged = _average(states)
    found = {average: states[average]} if averaged else _without_other_parts(states)
    if len(found) > 1:
        names = [
            f"{name} ({len(state)} tensors{', a moving average' if is_average(name) else ''})"
            for name, state in found.items()
        ]
        raise DataError(
            f"{path} holds several sets of weights: {', '.join(names[:_SHOWN])}",
            "name one: " + ", or ".join(f"--model.weights_key {name}" for name in list(found)[:_SHOWN]),
        )
    ((name, state),) = found.items()
    weights = _plain(state)
    others = [other for other in _states(loaded, 3) if other not in (name, averaged)]
    left = f", {', '.join(others[:_SHOWN])} left out" if others else ""
    if averaged:
        weights.notes = (average_taken(name, averaged) + left,)
    elif name and (name not in _USUAL or others):
        weights.notes = (f"of what it holds, {name} was taken{left}",)
    return weights


def average_taken(average: str, averaged: str) -> str:
    """Returns the note on an average that was taken in place of the model beside it, by their keys."""
    return f"the moving average {average} was taken; for the model itself: --model.weights_key {averaged}"


def is_average(name: str) -> bool:
    """Tells whether a key is one by which programs save a moving average of a model's weights."""
    return not _AVERAGES.isdisjoint(word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def _average(states: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Returns the keys of the one average and of the one model that it is of, as timm does; "" where there are none.

    The average has all tensors of the model, in the same shapes.
    """
    averages = [name for name in states if is_average(name)]
    models = list(_usual({name: state for name, state in states.items() if name not in averages}))
    if len(averages) != 1 or len(models) != 1 or _TEACHER in " ".join(states):
        return "", ""
    shapes, wanted = (_shapes(states[name]) for name in (averages[0], models[0]))
    return (averages[0], models[0]) if wanted.items() <= shapes.items() else ("", "")


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a state_dict's tensors by their names without what wrappers put before them."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): tuple(value.shape)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


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
    """Leaves out the tensors of a loss, a callback, ..., where none is an average."""
    return states if any(is_average(name) or _TEACHER in name for name in states) else _usual(states)


def _usual(states: dict[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Returns the one state_dict of a usual name; all where there are none or several."""
    usual = {name: state for name, state in states.items() if name.rpartition(".")[2] in _USUAL}
    return usual if len(usual) == 1 else states


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and "param_groups" in value


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
