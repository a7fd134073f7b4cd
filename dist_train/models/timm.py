"""timm's models: `timm/resnet18`, or `timm/` and any other name of timm. Needs the extra `timm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dist_train.errors import ConfigError, DataError, Problem, did_you_mean, first_line

PREFIX = "timm/"


def check_name(name: str) -> None:
    """Raises ConfigError, with the nearest names, where timm has no such model."""
    import timm

    bare = name.removeprefix(PREFIX)
    if not timm.is_model(bare):
        near = did_you_mean(bare.partition(".")[0], timm.list_models(), count=3, before=PREFIX)
        hint = near or "python -c 'import timm; print(*timm.list_models())' lists them all"
        raise ConfigError([Problem("model.name", f"timm has no model {bare!r}", hint=hint)])


def build(name: str, num_classes: int, in_channels: int, **args: Any) -> nn.Module:
    """Builds `timm.create_model` with a head of `num_classes` for images of `in_channels`, untrained."""
    import timm

    given: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    model: nn.Module = timm.create_model(name.removeprefix(PREFIX), **(given | args))
    return model


def named_weights(name: str, weights: str) -> Callable[[], dict[str, Tensor]]:
    """Returns a function that fetches timm's trained weights, and raises DataError where the download fails.

    `weights` is "pretrained"; a tag belongs to the model's name (timm/resnet18.a1_in1k).

    Raises:
        ConfigError: another word than "pretrained", or timm has no weights for the model.
    """
    import timm

    bare = name.removeprefix(PREFIX)
    if weights != "pretrained":
        hint = f"--model.weights pretrained; a tag belongs to the name: --model.name {name.partition('.')[0]}.TAG"
        raise ConfigError([Problem("model.weights", f"timm has no weights {weights!r}", hint=hint)])
    check_name(name)
    if not timm.models.is_model_pretrained(bare):
        raise ConfigError([Problem("model.weights", f"timm has no trained weights of {bare}", hint="leave it out")])

    def fetch() -> dict[str, Tensor]:
        try:
            state: dict[str, Tensor] = timm.create_model(bare, pretrained=True).state_dict()
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(
                f"cannot download the weights of {name}: {first_line(error)}",
                "fetch them where there is a network (timm.create_model(NAME, pretrained=True)), save the state_dict "
                "as .safetensors, then --model.weights FILE",
            ) from error
        return state

    return fetch
