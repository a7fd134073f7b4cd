"""Hugging Face's models: `hf/bert` by a configuration, `hf/FOLDER`, or `hf/NAME` of the hub. Needs the extra `hf`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError, Problem, did_you_mean, first_line
from dist_train.hub import PREFIX, bare, reading
from dist_train.models.weight_files import Weights

PRETRAINED, RANDOM = "pretrained", "random"
"""Values of model.weights beside files."""
_HEADS = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "image": "AutoModelForImageClassification",
}
_ATTENTION = ("eager", "sdpa")  # others fetch kernels, which are code
_WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def check_args(name: str, args: Mapping[str, Any]) -> None:
    """Checks `model.args` without reading files.

    Raises:
        ConfigError: an unknown head, attention, or a configuration of no known model type.
    """
    problems = []
    for key, given, known in (
        ("head", args.get("head", "sequence"), tuple(_HEADS)),
        ("attention", args.get("attention", "eager"), _ATTENTION),
    ):
        if given not in known:
            hint = f"--model.args.{key} {' | '.join(known)}"
            problems.append(Problem(f"model.args.{key}", f"there is no {key} {given!r}", hint=hint))
    config = args.get("config")
    if isinstance(config, Mapping):
        problems += _type_problems(str(config.get("model_type", bare(name))))
    elif config is not None and not isinstance(config, str):
        hint = "--model.args.config '{hidden_size: 64}', or --model.args.config FILE.json"
        problems.append(Problem("model.args.config", f"is {config!r}, no settings and no file", hint=hint))
    if problems:
        raise ConfigError(problems)


def _type_problems(kind: str) -> list[Problem]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:
        return []
    hint = did_you_mean(kind, CONFIG_MAPPING.keys(), count=3, before=PREFIX) or "such as hf/bert, hf/vit"
    return [Problem("model.name", f"transformers has no model type {kind!r}", hint=hint)]


def build(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    head: str = "sequence",
    config: Mapping[str, Any] | str | None = None,
    attention: str = "eager",
) -> nn.Module:
    """Builds a model of transformers with a head of `num_classes`, untrained; its outputs are the logits alone.

    Args:
        name: `hf/` and a folder with a config.json, or a name on the hub; with `config` a model type, as hf/bert.
        in_channels: of images; for other heads it is not used.
        head: sequence: logits [B, num_classes] of a text; token: [B, num_classes, S] of its tokens; image:
            [B, num_classes] of images [B, in_channels, H, W].
        config: settings of the model type, or a JSON file with them.
        attention: eager: matrix products and softmax, which all formats take; sdpa: torch's fused kernel.

    Raises:
        ConfigError: an argument is wrong.
        DataError: the configuration cannot be read, or is of a model that has no such head.
    """
    import transformers

    check_args(name, {"head": head, "config": config, "attention": attention})
    settings = _configuration(name, config)
    settings.num_labels = num_classes
    if head == "image" and hasattr(settings, "num_channels"):
        settings.num_channels = in_channels
    auto = getattr(transformers, _HEADS[head])
    with reading("model", bare(name), asks=False):
        model: nn.Module = auto.from_config(
            settings, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
        )
    # A class of its own in place of a wrapper: weights keep the names that they have in files.
    model.__class__ = _logits_only(type(model), by_token=head == "token")
    return model


def _logits_only(model: type[nn.Module], by_token: bool) -> type[nn.Module]:
    """Makes a class whose forward returns the logits in place of a ModelOutput; classes come before tokens."""

    @functools.wraps(model.forward)  # torch.export reads the names of the inputs there
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = model.forward(self, *args, **kwargs).logits
        return logits.transpose(1, 2) if by_token else logits

    return type(model.__name__, (model,), {"forward": forward, "__module__": model.__module__})


def _configuration(name: str, config: Mapping[str, Any] | str | None) -> Any:
    """Returns transformers' configuration of a model."""
    from transformers import AutoConfig

    with reading("model", bare(name), asks=config is None):
        if isinstance(config, Mapping):
            settings = {key: value for key, value in config.items() if key != "model_type"}
            return AutoConfig.for_model(str(config.get("model_type", bare(name))), **settings)
        if config is not None:
            return _from_file(name, Path(config))
        return AutoConfig.from_pretrained(bare(name), trust_remote_code=False)


def _from_file(name: str, file: Path) -> Any:
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("model.args.config", f"{file}: {first_line(error)}", hint="a JSON file")]) from error
    problems = _type_problems(str(settings.get("model_type", bare(name))))
    if problems:
        raise ConfigError(problems)
    return _configuration(name, settings)


def default_weights(name: str, args: Mapping[str, Any]) -> str | None:
    """Weights of a model that the config names none for: those of its folder, or of its name on the hub.

    None where it is built from `model.args.config`, or the folder has none.
    """
    folder = Path(bare(name))
    if args.get("config") is not None:
        return None
    if folder.is_dir() and not any((folder / each).is_file() for each in _WEIGHT_FILES):
        return None
    return PRETRAINED


def named_weights(name: str, weights: str, args: Mapping[str, Any]) -> Callable[[], Mapping[str, Tensor]]:
    """Returns a function that reads the weights of a folder, or of a name on the hub, without running code of theirs.

    safetensors is preferred; other files are read by torch with weights_only. Layers that the weights lack, as a head,
    keep their initial values. It raises DataError where reading fails.

    Raises:
        ConfigError: `weights` is not "pretrained".
    """
    if weights != PRETRAINED:
        hint = f"--model.weights {PRETRAINED}, {RANDOM} or FILE"
        raise ConfigError([Problem("model.weights", f"{name} has no weights {weights!r}", hint=hint)])

    def read() -> Mapping[str, Tensor]:
        import transformers

        auto = getattr(transformers, _HEADS[args.get("head", "sequence")])
        with reading("model", bare(name)):
            model, found = auto.from_pretrained(
                bare(name),
                attn_implementation=args.get("attention", "eager"),
                dtype=torch.float32,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
            )
        absent = frozenset(found["missing_keys"])
        state = Weights({key: value for key, value in model.state_dict().items() if key not in absent})
        state.absent = absent
        layers = sorted({key.rpartition(".")[0] for key in absent})
        state.notes = (f"new, as it has none: {', '.join(layers)}",) if layers else ()
        return state

    return read
