"""Calls a model on data at set-up, and says what is wrong where it fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_train import registry
from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.errors import DataError, ModelError, first_line
from dist_train.trees import Tree, call, is_image, map_leaves, named_leaves

_ROWS = 2


def forward(config: Config, model: nn.Module, inputs: Tree) -> Any:
    """Returns the model's outputs.

    Raises:
        DataError: one of our models does not take the inputs. Errors of other people's code are left as they are,
            because its traceback helps.
    """
    try:
        return call(model, inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        _require_float32(model)
        if not is_ours(registry.models.entry(config.model.name)):
            raise
        if not isinstance(inputs, Tensor):
            given = ", ".join(_described(name, leaf) for name, leaf in named_leaves(inputs))
            message = f"the model {config.model.name} cannot take {given}: {first_line(error)}"
            raise DataError(message, _advice(model, error)) from error
        if not isinstance(error, RuntimeError):
            raise
        shape = list(inputs.shape[1:])
        if not is_image(inputs):
            raise DataError(
                f"the model {config.model.name} cannot take inputs {shape}: {first_line(error)}",
                "choose another --model.name; most models here take images, [C, H, W]",
            ) from error
        raise DataError(
            f"the model {config.model.name} cannot take images {shape}: {first_line(error)}",
            "choose another --model.name (small_resnet takes images of 8 pixels and more), or larger images",
        ) from error


def forward_longest(config: Config, model: nn.Module, inputs: Tree, dataset: object, world: World) -> None:
    """Tries the longest item with the largest numbers, which a dataset's method `longest` gives, if it has one.

    The first items may be short, and their numbers small: others would end the run in the middle.

    Args:
        inputs: the first items, as the model takes them.

    Raises:
        DataError: one of our models does not take it, or it is no item.
    """
    longest = getattr(dataset, "longest", None)
    if not callable(longest):
        return
    try:
        item = longest()
        given = [(name, leaf.dtype) for name, leaf in named_leaves(item)]
    except Exception as error:  # of the dataset's code, or a method of the name that means something else
        raise DataError(
            f"the method longest of {type(dataset).__name__} returns no inputs of an item: {first_line(error)}",
            "let it return the inputs of the longest item, as __getitem__ does, or give it another name",
        ) from error
    expected = [(name, leaf.dtype) for name, leaf in named_leaves(inputs)]
    if dict(given) != dict(expected):
        raise DataError(
            f"the method longest of {type(dataset).__name__} returns {_listed(given)}, and its items have "
            f"{_listed(expected)}",
            "let it return the inputs of the longest item, as __getitem__ does, or give it another name",
        )
    forward(config, model, map_leaves(lambda leaf: torch.stack([leaf] * _ROWS).to(world.device), item))


def is_ours(entry: registry.Entry) -> bool:
    """Tells whether a part that is registered by name is one of this package."""
    return isinstance(entry.target, str) and entry.target.startswith("dist_train.")


def _listed(leaves: list[tuple[str, torch.dtype]]) -> str:
    return ", ".join(f"{name or 'a tensor'} of {str(dtype)[6:]}" for name, dtype in leaves)


def _described(name: str, leaf: Tensor) -> str:
    most = f" with numbers up to {int(leaf.max()):,}" if not leaf.is_floating_point() and leaf.numel() else ""
    return f"{name} {list(leaf.shape)}{most}"


def _advice(model: nn.Module, error: Exception) -> str:
    if "padding token" in first_line(error):
        return (
            "give its config pad_token_id, the number that the tokenizer pads with (0 where it has none): "
            "in config.json, or in --model.args.config"
        )
    tables = [
        f"{name} {each.num_embeddings:,}" for name, each in model.named_modules() if isinstance(each, nn.Embedding)
    ]
    if not tables:
        return "look at model.args and data.args"
    return (
        f"rows of its embeddings: {', '.join(tables)}; numbers must lie below, and texts be no longer: "
        "--data.args.max_length N, another tokenizer, or resize_token_embeddings of transformers"
    )


def _require_float32(model: nn.Module) -> None:
    """Names the dtype as the cause if a model that failed has floating-point parameters other than float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ModelError(
                f"the model cannot take the inputs, whose floats are float32: its {name} is {str(parameter.dtype)[6:]}",
                "return model.float() from its builder; --precision bf16 computes in bf16 with float32 parameters",
            )
