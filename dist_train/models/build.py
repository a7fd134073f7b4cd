"""Builds the model that a config names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_train import registry
from dist_train.config.data import ModelConfig, is_weights_file
from dist_train.errors import ConfigError, Problem
from dist_train.models import timm
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
    return ConfigError([Problem("model.args", f"the model {config.name}: {error}", hint=hint)])


def build_model(config: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    """Calls the registered function.

    Raises:
        ConfigError: it does not take an argument, or rejects its value.
    """
    arguments = model_arguments(config, num_classes, in_channels)
    try:
        model: nn.Module = registry.models.get(config.name)(**arguments)
    except (TypeError, ValueError) as error:
        if not config.args:
            raise
        raise _wrong(config, error, f"look at model.args: {config.args}") from error
    return model


def check_model(config: ModelConfig) -> None:
    """Checks name, arguments and weights, without data, files and network.

    Raises:
        ConfigError: wrong arguments, a name that timm does not know, or weights that the model does not have.
    """
    if config.name.startswith(timm.PREFIX):
        registry.models.get(config.name)  # says what to install
        timm.check_name(config.name)
    model_arguments(config, num_classes=2, in_channels=1)
    if config.weights is not None and not is_weights_file(config.weights):
        _named(config)


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
    if config.weights is None:
        return None
    if is_weights_file(config.weights):
        path = Path(config.weights)
        return str(path), lambda: read_file(path, config.weights_key)
    return f"{config.weights} of {config.name}", _named(config)


def _named(config: ModelConfig) -> Callable[[], dict[str, Tensor]]:
    assert config.weights is not None
    named = registry.models.entry(config.name).weights
    if named is None:
        message = f"the model {config.name} has no weights by name, and {config.weights!r} is no file"
        hint = "give a .safetensors, .pt or .pth file; a path has a dot or a slash, as in ./FILE"
        raise ConfigError([Problem("model.weights", message, hint=hint)])
    fetch: Callable[[], dict[str, Tensor]] = registry.resolve(named)(config.name, config.weights)
    return fetch
