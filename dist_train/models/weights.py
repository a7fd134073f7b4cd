"""Loads trained weights to start from: from a file or another run, fitted to another head and other channels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_train.errors import CheckpointError, DataError, RunDirError
from dist_train.models.first_conv import first_conv, fit_channels
from dist_train.models.weight_files import Weights, average_taken, is_average
from dist_train.models.weight_formats import SAVE
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.paths import RunDir

# Auxiliary heads, without which the models here are built.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "net.aux_classifier.")


def read_run(run_dir: Path) -> Weights:
    """Reads the float model of another run from the end of its stage `train`, or from its newest checkpoint within it.

    Of a run that was stopped in `train` it is the trained model itself, not the moving average.

    Raises:
        DataError: the run has none.
    """
    folder = CheckpointFolder(RunDir(run_dir).checkpoints)
    try:
        name, newest = folder.load_newest()
        if name is None:
            raise DataError(
                f"model.init_from: {run_dir} has no trained float model: it has saved no checkpoint yet",
                "wait until it has saved one, or name another run",
            )
        finished = newest["finished_stages"]
        if "train" in finished:
            return Weights(folder.load(finished["train"])["payload"]["model"])
    except (CheckpointError, RunDirError) as error:
        raise DataError(f"model.init_from: {error.message}", error.hint) from error
    if newest["stage"] != "train":
        raise DataError(
            f"model.init_from: {run_dir} has no trained float model: it is in {newest['stage']}, without train before",
            "name a run with the stage train",
        )
    weights = Weights(newest["payload"]["model"])
    weights.notes = (f"after step {newest['payload']['step']} of its unfinished stage train",)
    return weights


def require_dense(state: Mapping[str, Tensor], source: str) -> None:
    """Raises DataError for a tensor that is no dense array of numbers: sparse, nested, quantized, or without values."""
    for key, value in state.items():
        kind = _kind(value)
        if kind:
            raise DataError(
                f"{source} holds a tensor that cannot be loaded: {key} is {kind}",
                f"save the weights in floats, dense and with values: {SAVE}",
            )


def _kind(value: Tensor) -> str:
    """Describes a tensor that is no dense array of numbers; "" for one that is."""
    if value.is_nested:
        return "a nested tensor"
    if value.is_quantized:
        return f"quantized ({str(value.dtype).removeprefix('torch.')})"
    if value.layout != torch.strided:
        return f"sparse ({str(value.layout).removeprefix('torch.')})"
    return "on the meta device, without values" if value.is_meta else ""


def digest(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of names, shapes, dtypes and values of dense tensors."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
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
        DataError: names are missing or unknown, or shapes differ elsewhere; names the layers and both shapes. Or a
            tensor is no dense one, or its numbers are of another kind than the model's (integers for floats).
    """
    require_dense(state, source)
    own = model.state_dict()
    # Files from before 2018 lack these counters, which only a BatchNorm without momentum reads.
    absent = state.absent if isinstance(state, Weights) else frozenset()
    required = [key for key in own if not key.endswith("num_batches_tracked") and key not in absent]
    named, notes = _named_as(required, state, source)
    given = {key: value for key, value in named.items() if key in own or not key.startswith(_AUXILIARY)}
    missing = [key for key in required if key not in given]
    unknown = [key for key in given if key not in own]
    if missing or unknown:
        listed = " and".join(filter(None, (_some("lacks", missing), _some("has besides", unknown))))
        raise DataError(f"{source} is of another model: it{listed}", "--model.name and --model.args of its own model")
    parameters = {name: given[name] for name, _ in model.named_parameters() if name in given}
    _require_numbers(own, given, set(parameters), source)
    _require_finite({name: value.to(own[name].dtype) for name, value in parameters.items()}, source)
    notes += _fit_first_conv(model, own, given, source)
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


def _named_as(required: list[str], state: Mapping[str, Tensor], source: str) -> tuple[Mapping[str, Tensor], list[str]]:
    """Returns `state` with the model's names, where only a prefix differs, and a line for each change.

    Wrappers, Lightning and programs of several networks put `module.`, `model.` or `student.` before all names of one.
    Of a model and its moving average (`model.`, `model_ema.`) the average is taken.

    Raises:
        DataError: the model's names are there under several prefixes.
    """
    notes = list(state.notes) if isinstance(state, Weights) else []
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    if not required or all(key in state for key in required):
        return state, notes
    first = required[0]
    prefixes = [key.removesuffix(first) for key in state if key.endswith(f".{first}")]
    found = [prefix for prefix in prefixes if all(prefix + key in state for key in required)]
    averages = [prefix for prefix in found if is_average(prefix)]
    if len(found) == 2 and len(averages) == 1:
        (other,) = set(found).difference(averages)
        notes.append(average_taken(averages[0].rstrip("."), other.rstrip(".")))
        found = averages
    if len(found) > 1:
        raise DataError(
            f"{source} holds the model's weights several times, under {', '.join(found)}",
            "name one: " + ", or ".join(f"--model.weights_key {prefix.rstrip('.')}" for prefix in found),
        )
    if found:
        (prefix,) = found
        if prefix not in ("module.", *averages):
            notes.append(f"its names without {prefix}")
        others = [key for key in state if not key.startswith(prefix)]
        if others:
            notes.append(f"without its {len(others)} other entries: {', '.join(others[:3])}")
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, notes
    inner = first.partition(".")[0] + "."
    if all(key.startswith(inner) and key.removeprefix(inner) in state for key in required):
        return {inner + key: value for key, value in state.items()}, notes
    return state, notes


def _require_numbers(own: Mapping[str, Tensor], given: Mapping[str, Tensor], parameters: set[str], source: str) -> None:
    """Raises DataError where floats, integers or complex numbers stand for another kind.

    A buffer, as a mask or a count, may be of another kind where all its values stay the same.
    """
    for key, value in given.items():
        here = own.get(key)
        if here is None or _numbers(value) == _numbers(here):
            continue
        if key in parameters or not torch.equal(value.to(here.dtype).to(value.dtype), value):
            raise DataError(
                f"{source} does not fit the model: {key} is {_numbers(value)} ({_dtype(value)}) there, "
                f"{_numbers(here)} ({_dtype(here)}) in the model",
                "give the weights from before they were quantized or converted: model.float().state_dict()",
            )


def _numbers(tensor: Tensor) -> str:
    return "floats" if tensor.is_floating_point() else "complex numbers" if tensor.is_complex() else "integers"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _require_finite(given: Mapping[str, Tensor], source: str) -> None:
    """Raises DataError for NaN and inf in parameters; buffers, as of masks, may hold them."""
    for key, value in given.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(f"{source} is damaged, or its training failed: {key} has NaN or inf", "give another file")


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
        # A detector's head has columns of each anchor, and of the background.
        and (own[key].shape[0] == num_outputs or ".classification_head." in key)
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
