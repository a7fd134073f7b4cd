"""Builds the model that a config names."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from dist_train import registry
from dist_train.config import ModelConfig
from dist_train.errors import ConfigError, Problem


def build_model(config: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    """Calls the registered function with `config.args`, and with name, num_classes and in_channels where it takes them.

    Raises:
        ConfigError: arguments that the function does not take, or required ones that are absent.
    """
    function = registry.models.get(config.name)
    offered: dict[str, Any] = {"name": config.name, "num_classes": num_classes, "in_channels": in_channels}
    parameters = inspect.signature(function).parameters
    arguments = {key: value for key, value in offered.items() if key in parameters} | config.args
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            [Problem("model.args", f"the model {config.name}: {error}", hint=f"it takes {', '.join(parameters)}")]
        ) from None
    model: nn.Module = function(**arguments)
    return model
