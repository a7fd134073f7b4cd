"""torchvision's quantizable models, for the eager backend: float models that mark the parts to quantize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision.models
from torch import Tensor, nn

from dist_train.models.first_conv import replace_first_conv
from dist_train.models.torchvision import named_weights

_PREFIX = "quantized_"


def build(name: str, num_classes: int, in_channels: int, **args: Any) -> nn.Module:
    """Builds `torchvision.models.get_model(name, quantize=False)` with a head of `num_classes`, untrained.

    It takes any number of channels. Auxiliary heads are left out: with them, the output in training is a tuple.
    """
    settings: dict[str, Any] = {"weights": None, "quantize": False, "num_classes": num_classes}
    if name in ("quantized_googlenet", "quantized_inception_v3"):
        settings |= {"aux_logits": False, "init_weights": True}
    model: nn.Module = torchvision.models.get_model(name, **(settings | args))
    if in_channels != 3:
        replace_first_conv(model, in_channels)
    return model


def float_weights(name: str, weights: str) -> Callable[[], dict[str, Tensor]]:
    """Like `torchvision.named_weights`, for the plain model: the quantizable one has the same parameters and names."""
    return named_weights(name.removeprefix(_PREFIX), weights)
