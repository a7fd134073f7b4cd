"""Loads trained weights to start from: from a file or another run, fitted to another head and other channels."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_train.errors import CheckpointError, DataError, RunDirError, first_line
from dist_train.models.first_conv import first_conv, fit_channels
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.paths import RunDir

# Auxiliary heads, without which the models here are built.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "net.aux_classifier.")
# Prefixes that wrappers put before every key.
_PREFIXES = ("module.", "_orig_mod.")


def read_file(path: Path) -> dict[str, Tensor]:
    """Reads the state_dict in a .safetensors, .pt or .pth file, at the top or under "state_dict" or "model".

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise DataError(
            f"cannot read weights from {path}: {first_line(error)}",
            "save a state_dict alone: torch.save(model.state_dict(), FILE), "
            "or safetensors.torch.save_model(model, FILE)",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(
            f"{path} does not hold a state_dict, but a {type(loaded).__name__}",
            "torch.save(model.state_dict(), FILE)",
        )
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return dict(loaded)


def read_run(run_dir: Path) -> dict[str, Tensor]:
    """Reads the float model of another run from the end of its stage `train`.

    Raises:
        DataError: the run has none.
    """
    folder = CheckpointFolder(RunDir(run_dir).checkpoints)
    try:
        latest = folder.latest
        finished = {} if latest is None else folder.load(latest)["finished_stages"]
        if "train" not in finished:
            raise DataError(
                f"model.init_from: {run_dir} has no trained float model", "finish its stage train, or name another run"
            )
        state: dict[str, Tensor] = folder.load(finished["train"])["payload"]["model"]
    except (CheckpointError, RunDirError) as error:
        raise DataError(f"model.init_from: {error.message}", error.hint) from error
    return state


def digest(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        tensor = value.detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str, num_outputs: int) -> list[str]:
    """Loads `state` into `model`, in place.

    A head with another number of outputs keeps its initial values. A first convolution for another number of channels
    is fitted, see `fit_channels`.

    Args:
        source: origin of `state`, for the messages.
        num_outputs: width of the model's head.

    Returns:
        a line for each part that was not loaded unchanged.

    Raises:
        DataError: names are missing or unknown, or shapes differ elsewhere; names the layers and both shapes.
    """
    own = model.state_dict()
    given = {key: value for key, value in state.items() if key in own or not key.startswith(_AUXILIARY)}
    # Files from before 2018 lack these counters, which only a BatchNorm without momentum reads.
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in own]
    if missing or unknown:
        listed = _some("lacks", missing) + _some("does not know", unknown, " and the model ")
        raise DataError(f"{source} is of another model: it{listed}", "--model.name and --model.args of its own model")
    notes = _fit_first_conv(model, own, given, source)
    different = [key for key in given if given[key].shape != own[key].shape]
    head = _head(own, given, different, num_outputs)
    if different and not head:
        lines = "; ".join(
            f"{key} is {_shape(given[key])} there, {_shape(own[key])} in the model" for key in different[:4]
        )
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        raise DataError(
            f"{source} does not fit the model: {lines}{more}", "--model.name and --model.args of its own model"
        )
    if head:
        there = given[different[0]].shape[0]
        notes.append(f"the head {head} is new: {num_outputs} outputs, {there} in {source}")
    for key in different:
        del given[key]
    model.load_state_dict(given, strict=False)
    return notes


def _fit_first_conv(model: nn.Module, own: Mapping[str, Tensor], given: dict[str, Tensor], source: str) -> list[str]:
    found = first_conv(model)
    if found is None or f"{found[0]}.weight" not in given or given[f"{found[0]}.weight"].dim() != 4:
        return []
    first, key = found[0], f"{found[0]}.weight"
    there, here = given[key].shape, own[key].shape
    if there[1] == here[1] or (there[0], *there[2:]) != (here[0], *here[2:]):
        return []
    given[key] = fit_channels(given[key], here[1])
    return [f"the first convolution {first} is fitted to {here[1]} channels, {there[1]} in {source}"]


def _head(own: Mapping[str, Tensor], given: Mapping[str, Tensor], different: list[str], num_outputs: int) -> str:
    """Names the layers of `different`, if they differ only in the number of the model's outputs; else "".

    In any other layer, another width also changes the next layer's second dimension.
    """
    fits = all(
        given[key].dim() == own[key].dim() > 0
        and given[key].shape[1:] == own[key].shape[1:]
        and own[key].shape[0] == num_outputs
        for key in different
    )
    return " and ".join(dict.fromkeys(key.rpartition(".")[0] for key in different)) if fits else ""


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _some(verb: str, keys: list[str], before: str = " ") -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{before}{verb} {', '.join(keys[:3])}{more}"
