"""torchvision's models by name: classification and semantic segmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.error import URLError

import torch
import torchvision.models
from torch import Tensor, nn

from dist_train.errors import ConfigError, DataError, Problem
from dist_train.models.first_conv import replace_first_conv

# Their auxiliary heads return a second tensor in training; only the main head is trained here.
_AUXILIARY = ("googlenet", "inception_v3")


def build(name: str, num_classes: int, in_channels: int, **args: Any) -> nn.Module:
    """Builds `torchvision.models.get_model(name)` with a head of `num_classes`, untrained, without auxiliary heads.

    For images without 3 channels, the first convolution is a fresh one.
    """
    given: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name in _AUXILIARY:
        given["aux_logits"] = False
        # Trained weights expect inputs in -1..1; this setting converts normalized ones. Fresh weights need neither.
        given["transform_input"] = in_channels == 3
        given["init_weights"] = True
    model: nn.Module = torchvision.models.get_model(name, **(given | args))
    if in_channels != 3:
        replace_first_conv(model, in_channels)
    return model


def segmentation(name: str, num_classes: int, in_channels: int, **args: Any) -> nn.Module:
    """Builds a segmentation model, untrained: outputs [B, num_classes, H, W], the dictionary's "out"."""
    given: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": num_classes}
    model: nn.Module = torchvision.models.get_model(name, **(given | args))
    if in_channels != 3:
        replace_first_conv(model, in_channels)
    return _Out(model)


class _Out(nn.Module):
    """The main output of a model that returns a dictionary."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)["out"]
        return out


def named_weights(name: str, weights: str) -> Callable[[], dict[str, Tensor]]:
    """Returns a function that fetches torchvision's weights of that name (DEFAULT, IMAGENET1K_V1).

    It takes them from torch.hub's cache or the network, and raises DataError where the download fails.

    Raises:
        ConfigError: the model has no weights of that name.
    """
    known = torchvision.models.get_model_weights(name)
    if weights not in known.__members__:
        names = ", ".join(known.__members__) or "none; train it, or give a file"
        raise ConfigError([Problem("model.weights", f"{name} has no weights {weights!r}", hint=f"it has: {names}")])
    chosen: Any = known[weights]

    def fetch() -> dict[str, Tensor]:
        try:
            state: dict[str, Tensor] = chosen.get_state_dict(progress=False, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise DataError(
                f"cannot download the weights of {name}: {error}",
                f"fetch {chosen.url} where there is a network, then --model.weights FILE; "
                f"or put it into {torch.hub.get_dir()}/checkpoints",
            ) from error
        return state

    return fetch


def named_segmentation_weights(name: str, weights: str) -> Callable[[], dict[str, Tensor]]:
    """Like `named_weights`, with the parameter names of `segmentation`."""
    fetch = named_weights(name, weights)
    return lambda: {f"net.{key}": value for key, value in fetch().items()}
