"""Builds the model that a config names."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from dist_train import registry
from dist_train.config_data import ModelConfig
from dist_train.errors import ConfigError, Problem


def model_arguments(config: ModelConfig, num_classes: int, in_channels: int) -> dict[str, Any]:
    """What the registered function is called with: `config.args`, and name, num_classes and in_channels where it takes them.

    Raises:
        ConfigError: arguments that the function does not take, or required ones that are absent.
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
        ConfigError: arguments that it does not take, or cannot work with.
    """
    arguments = model_arguments(config, num_classes, in_channels)
    try:
        model: nn.Module = registry.models.get(config.name)(**arguments)
    except (TypeError, ValueError) as error:
        if not config.args:
            raise
        raise _wrong(config, error, f"look at model.args: {config.args}") from error
    return model
