"""Builds the model that a config names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_train import hub, registry
from dist_train.config.data import ModelConfig, is_weights_file
from dist_train.errors import ConfigError, ModelError, Problem, first_line
from dist_train.models import huggingface, timm
from dist_train.models.weight_files import read_file
from dist_train.models.weights import read_run


def model_arguments(config: ModelConfig, num_classes: int, in_channels: int) -> dict[str, Any]:
    """Collects the registered function's arguments.

    These are `config.args`, and name, num_classes and in_channels where it takes them.

    Raises:
        ConfigError: the function does not take an argument, or lacks a required one.
    """
    function = registry.models.get(config.name)
    offered: dict[str, Any] = {"name": config.name, "num_classes": num_classes, "in_channels": in_channels}
    signature = inspect.signature(function)
    arguments = {key: value for key, value in offered.items() if key in signature.parameters} | config.args
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise _wrong(config, error, f"it takes {', '.join(signature.parameters)}") from None
    return arguments


def _wrong(config: ModelConfig, error: Exception, hint: str) -> ConfigError:
    return ConfigError([Problem("model.args", f"the model {config.name}: {first_line(error)}", hint=hint)])


def build_model(config: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    """Calls the registered function.

    Raises:
        ConfigError: it does not take an argument, or rejects its value.
        ModelError: what it returns is no module.
    """
    arguments = model_arguments(config, num_classes, in_channels)
    try:
        model: nn.Module = registry.models.get(config.name)(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        # torch raises RuntimeError for sizes below 0 or beyond 64 bits, and a model of the user's for anything.
        if not config.args or (isinstance(error, RuntimeError) and not _ours(config)):
            raise
        raise _wrong(config, error, f"look at model.args: {config.args}") from error
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ModelError(
            f"the function of the model {config.name} returns {given}, not a torch.nn.Module",
            "return a module: an object of the class",
        )
    return model


def _ours(config: ModelConfig) -> bool:
    target = registry.models.entry(config.name).target
    return isinstance(target, str) and target.startswith("dist_train.")


def check_model(config: ModelConfig) -> None:
    """Checks name, arguments and weights, without data, files and network.

    Raises:
        ConfigError: wrong arguments, a name that timm does not know, or weights that the model does not have.
    """
    if config.name.startswith(timm.PREFIX):
        registry.models.get(config.name)  # says what to install
        timm.check_name(config.name)
    if config.name.startswith(hub.PREFIX):
        registry.models.get(config.name)
        huggingface.check_args(config.name, config.args)
    model_arguments(config, num_classes=2, in_channels=1)
    weights = _weights(config)
    if weights is not None and not is_weights_file(weights):
        _named(config, weights)


def initial_weights(config: ModelConfig) -> tuple[str, Callable[[], Mapping[str, Tensor]]] | None:
    """Returns the source of the trained weights to start from, in words, and a function that reads them.

    None where the model starts untrained. The function may download (torchvision, timm), and raises DataError where
    that or reading fails.

    Raises:
        ConfigError: the model has no weights of that name.
    """
    if config.init_from is not None:
        run_dir = config.init_from
        return f"the run {run_dir}", lambda: read_run(run_dir)
    weights = _weights(config)
    if weights is None:
        return None
    if is_weights_file(weights):
        path = Path(weights)
        return str(path), lambda: read_file(path, config.weights_key)
    return f"{weights} of {config.name}", _named(config, weights)


def _weights(config: ModelConfig) -> str | None:
    """Returns `model.weights`; for a model of Hugging Face those that it comes with, unless they are to be random."""
    if not config.name.startswith(hub.PREFIX) or config.init_from is not None:
        return config.weights
    if config.weights is None:
        return huggingface.default_weights(config.name, config.args)
    return None if config.weights == huggingface.RANDOM else config.weights


def _named(config: ModelConfig, weights: str) -> Callable[[], Mapping[str, Tensor]]:
    entry = registry.models.entry(config.name).weights
    if entry is None:
        message = f"the model {config.name} has no weights by name, and {weights!r} is no file"
        hint = "give a .safetensors, .pt or .pth file; a path has a dot or a slash, as in ./FILE"
        raise ConfigError([Problem("model.weights", message, hint=hint)])
    named = registry.resolve(entry)
    further = {"args": config.args} if "args" in inspect.signature(named).parameters else {}
    fetch: Callable[[], Mapping[str, Tensor]] = named(config.name, weights, **further)
    return fetch
