"""torchvision's classification models by name."""

from __future__ import annotations

from typing import Any

import torchvision.models
from torch import nn

from dist_train.errors import DataError


def build(name: str, num_classes: int, in_channels: int, **args: Any) -> nn.Module:
    """`torchvision.models.get_model(name)` with a head of `num_classes`, untrained.

    Raises:
        DataError: the data's images do not have three channels.
    """
    if in_channels != 3:
        raise DataError(
            f"torchvision's {name} takes images with 3 channels, the dataset has {in_channels}",
            "--model.name small_resnet, or a dataset of RGB images",
        )
    model: nn.Module = torchvision.models.get_model(name, **({"weights": None, "num_classes": num_classes} | args))
    return model
