"""Checks that model, data and task fit, before training starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from dist_train import registry
from dist_train.config.data import DataConfig
from dist_train.config.tree import Config
from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.items import name_of
from dist_train.data.splits import Splits
from dist_train.data.stack import first_batch
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DataError, ModelError, Problem, first_line
from dist_train.tasks import Task

_MOVING = ("random_crop", "random_horizontal_flip", "random_resized_crop", "rand_augment")


@torch.no_grad()
def check_fit(config: Config, model: nn.Module, splits: Splits, task: Task, world: World) -> None:
    """Checks the targets, and runs the model on two images of zeros in eval and train mode. Changes nothing.

    Raises:
        ConfigError: an augmentation would move the images but not their masks.
        DataError: the targets do not suit the task, or the model's outputs do not fit the data.
        ModelError: the model does not return a tensor, or its parameters are not float32.
    """
    targets = _targets(splits, task)
    for each in targets:
        task.check_targets(each)
        if each.dim() > 2 and each.shape[-2:] == splits.input_shape[-2:]:
            _require_masks_follow(config.data)
    inputs = torch.zeros(2, *splits.input_shape, device=world.device)
    outputs = _one_tensor(_forward(config, model.eval(), inputs))
    task.check_outputs(outputs)
    _require_fit(config, task, outputs.float(), targets)
    # In train mode, on copies of the buffers, because batch norms update theirs.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _one_tensor(torch.func.functional_call(model.train(), buffers, (inputs,)), "while training, ")
    model.eval()


def _targets(splits: Splits, task: Task) -> list[torch.Tensor]:
    """Returns targets of both splits, each [N, ...]: all of image arrays, the first one of a map-style dataset."""
    found = []
    for name, split in (("train", splits.train), ("eval", splits.eval)):
        if isinstance(split, ImageArrays):
            found.append(split.targets)
        elif not isinstance(split, IterableDataset):
            first = first_batch(split, task.check_targets)
            if first is not None:
                _require_stated(splits, name, first)
                found.append(first.targets)
    return found


def _require_stated(splits: Splits, name: str, first: Batch) -> None:
    """Checks the first item of a map-style dataset against what dataset and Splits state about it."""
    split = getattr(splits, name)
    shape, stated = tuple(first.inputs.shape[1:]), getattr(split, "input_shape", None)
    what = f"item {int(first.ids[0])} of {name_of(split)}"
    if stated is not None and tuple(stated) != shape:
        raise DataError(
            f"{what} has the shape {list(shape)}, and the dataset states input_shape {tuple(stated)}",
            f"input_shape = {shape}",
        )
    if first.inputs.dtype == torch.uint8 and not (len(shape) == 3 and len(splits.mean) == len(splits.std) == shape[0]):
        raise DataError(
            f"{what} is uint8 {list(shape)}: uint8 images [C, H, W] are normalized with Splits.mean and Splits.std of "
            f"each channel, which have {len(splits.mean)} and {len(splits.std)}",
            "Splits(..., mean=(0.5,), std=(0.5,)) with a number for each channel; or return finished float tensors",
        )


def _require_masks_follow(data: DataConfig) -> None:
    """Refuses augmentations that move pixels, as targets that are masks are not moved along."""
    moving = [step.name for step in data.augment if step.name in _MOVING] + (["cutmix"] if data.mix.cutmix else [])
    if moving:
        message = f"{', '.join(moving)} would move the images' pixels, but not the targets, which are masks"
        hint = "remove it (color_jitter and random_erasing are safe), or move both in a map-style dataset's __getitem__"
        raise ConfigError([Problem("data.augment" if data.augment else "data.mix.cutmix", message, hint=hint)])


def _forward(config: Config, model: nn.Module, inputs: torch.Tensor) -> Any:
    try:
        return model(inputs)
    except RuntimeError as error:
        _require_float32(model)
        if not _ours(registry.models.entry(config.model.name)):
            raise  # the model is the user's code, so the traceback helps
        raise DataError(
            f"the model {config.model.name} cannot take images {list(inputs.shape[1:])}: {first_line(error)}",
            "choose another --model.name (small_resnet takes images of 8 pixels and more), or larger images",
        ) from error


def _require_float32(model: nn.Module) -> None:
    """Names the dtype as the cause if a model that failed has floating-point parameters other than float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ModelError(
                f"the model cannot take the images, which are float32: its {name} is {str(parameter.dtype)[6:]}",
                "return model.float() from its builder; --precision bf16 computes in bf16 with float32 parameters",
            )


def _one_tensor(outputs: Any, when: str = "") -> torch.Tensor:
    if not isinstance(outputs, torch.Tensor):
        raise ModelError(
            f"{when}the model returns a {type(outputs).__name__}, not a tensor",
            "return only the logits from its forward, without auxiliary outputs, in train mode, too",
        )
    return outputs


def _require_fit(config: Config, task: Task, outputs: torch.Tensor, targets: list[torch.Tensor]) -> None:
    """Checks that the loss of outputs and real targets can be computed; masks, for example, need the outputs' size."""
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
            f"{first_line(error)}",
            "let the dataset give targets of the outputs' size, or choose another --task.name",
        ) from error
    if losses.shape != rows.shape[:1]:
        raise DataError(
            f"the loss of the task {config.task.name} has shape {list(losses.shape)} for {len(rows)} samples",
            'return one loss per sample, float [B]: use reduction="none", then the mean of each sample',
        )


def _ours(entry: registry.Entry) -> bool:
    return isinstance(entry.target, str) and entry.target.startswith("dist_train.")
