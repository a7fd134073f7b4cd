"""Checks that model, data and task fit, before training starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, default_collate

from dist_train import registry
from dist_train.config.data import DataConfig
from dist_train.config.tree import Config
from dist_train.data.arrays import ImageArrays
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DataError, ModelError, Problem
from dist_train.tasks import Task

_MOVING = ("random_crop", "random_horizontal_flip", "random_resized_crop", "rand_augment")


@torch.no_grad()
def check_fit(config: Config, model: nn.Module, splits: Splits, task: Task, world: World) -> None:
    """Checks the targets, and sends two images of zeros through the model in eval and train mode. Changes nothing.

    Raises:
        ConfigError: an augmentation would move the images and leave their masks.
        DataError: targets are not the task's, or the model's outputs are not those of the data.
        ModelError: the model returns no tensor, or has parameters of another type than the images.
    """
    targets = _targets(splits)
    for each in targets:
        task.check_targets(each)
        if each.dim() > 2 and each.shape[-2:] == splits.input_shape[-2:]:
            _require_masks_follow(config.data)
    inputs = torch.zeros(2, *splits.input_shape, device=world.device)
    outputs = _one_tensor(_forward(config, model.eval(), inputs))
    task.check_outputs(outputs)
    _require_fit(config, task, outputs.float(), targets)
    # In train mode, on copies of the buffers: batch norms count what they see.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _one_tensor(torch.func.functional_call(model.train(), buffers, (inputs,)), "while training, ")
    model.eval()


def _targets(splits: Splits) -> list[torch.Tensor]:
    """All targets of image arrays; of a map-style dataset the first; each [N, ...]."""
    found = []
    for split in (splits.train, splits.eval):
        if isinstance(split, ImageArrays):
            found.append(split.targets)
        elif not isinstance(split, IterableDataset) and len(split):  # type: ignore[arg-type]
            item = split[0]
            if isinstance(item, (tuple, list)) and len(item) == 2:
                collated = default_collate([item[1]])
                found += [collated] if isinstance(collated, torch.Tensor) else []
    return found


def _require_masks_follow(data: DataConfig) -> None:
    """Targets that are images themselves stay where they are: what moves pixels is refused."""
    moving = [step.name for step in data.augment if step.name in _MOVING] + (["cutmix"] if data.mix.cutmix else [])
    if moving:
        message = (
            f"{', '.join(moving)} would move the images' pixels, and the targets, which are masks, stay as they are"
        )
        hint = "remove it; color_jitter and random_erasing are safe, or move both in a map-style dataset's __getitem__"
        raise ConfigError([Problem("data.augment" if data.augment else "data.mix.cutmix", message, hint=hint)])


def _forward(config: Config, model: nn.Module, inputs: torch.Tensor) -> Any:
    try:
        return model(inputs)
    except RuntimeError as error:
        _require_float32(model)
        if not _ours(registry.models.entry(config.model.name)):
            raise  # with its traceback: it is the user's own
        raise DataError(
            f"the model {config.model.name} cannot take images {list(inputs.shape[1:])}: {str(error).splitlines()[0]}",
            "another --model.name (small_resnet takes images of 8 pixels and more), or larger images",
        ) from error


def _require_float32(model: nn.Module) -> None:
    """Of a model that failed."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ModelError(
                f"the model cannot take the images, which are float32: its {name} is {str(parameter.dtype)[6:]}",
                "return model.float() where it is built; --precision bf16 computes in less, with float32 parameters",
            )


def _one_tensor(outputs: Any, when: str = "") -> torch.Tensor:
    if not isinstance(outputs, torch.Tensor):
        raise ModelError(
            f"{when}the model returns a {type(outputs).__name__}, not a tensor",
            "return the logits alone from its forward, in train mode too: without auxiliary outputs",
        )
    return outputs


def _require_fit(config: Config, task: Task, outputs: torch.Tensor, targets: list[torch.Tensor]) -> None:
    """The loss of outputs and real targets can be computed: masks, for example, are of the outputs' size."""
    rows = targets[0][:2].to(outputs.device) if targets else None
    if rows is None:
        return
    try:
        losses = task.loss(outputs[: len(rows)], rows)
    except (RuntimeError, ValueError) as error:
        if not _ours(registry.tasks.entry(config.task.name)):
            raise
        raise DataError(
            f"outputs {list(outputs.shape)} of the model and targets {list(rows.shape)} of the data do not fit: "
            f"{str(error).splitlines()[0]}",
            "let the dataset give targets of the outputs' size, or choose another --task.name",
        ) from error
    if losses.shape != rows.shape[:1]:
        raise DataError(
            f"the loss of the task {config.task.name} has shape {list(losses.shape)} for {len(rows)} samples",
            'return one loss a sample, float [B]: reduction="none", then the mean over what a sample has',
        )


def _ours(entry: registry.Entry) -> bool:
    return isinstance(entry.target, str) and entry.target.startswith("dist_train.")
