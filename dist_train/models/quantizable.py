"""torchvision's models that say themselves where they are quantized, for the eager backend; in floating point until then."""

from __future__ import annotations

import inspect
from typing import Any

import torchvision.models
from torch import nn


def build(name: str, num_classes: int, in_channels: int, **args: Any) -> nn.Module:
    """`torchvision.models.get_model(name, quantize=False)` with a head of `num_classes`, untrained, for any number of channels.

    Auxiliary heads are left out: they would make the model's output in training a tuple.
    """
    settings: dict[str, Any] = {"weights": None, "quantize": False, "num_classes": num_classes}
    if name in ("quantized_googlenet", "quantized_inception_v3"):
        settings |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = torchvision.models.get_model(name, **(settings | args))
    if in_channels != 3:
        _replace_first_convolution(model, in_channels)
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    """The first Conv2d, in the order of the modules, gets another number of input channels and new weights."""
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    owner, _, attribute = name.rpartition(".")
    names = set(inspect.signature(nn.Conv2d).parameters) - {"in_channels", "bias", "device", "dtype"}
    settings = {key: getattr(old, key) for key in names}
    new = nn.Conv2d(in_channels=in_channels, bias=old.bias is not None, **settings)
    setattr(model.get_submodule(owner), attribute, new)
