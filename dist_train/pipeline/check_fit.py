"""Checks that model, data and task fit, before training starts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dist_train import registry
from dist_train.config.data import DataConfig
from dist_train.config.tree import Config
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.normalize import Normalization
from dist_train.data.first_items import first_batch
from dist_train.data.items import name_of, short
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DataError, ModelError, Problem, first_line
from dist_train.models.operators import ForeignOperators
from dist_train.pipeline.check_items import read_both
from dist_train.pipeline.first_forward import forward, forward_longest, is_ours
from dist_train.pipeline.same_data import EXAMPLE_ROWS, take_one_example
from dist_train.programs.operators import is_trusted
from dist_train.tasks import Task
from dist_train.training.outputs import in_float
from dist_train.trees import Tree, arguments, leaves, map_leaves, named_leaves, take

_WRITING = frozenset({"convert", "export"})  # stages that write a program
_MOVING = ("random_crop", "random_horizontal_flip", "random_resized_crop", "rand_augment")


@torch.no_grad()
def check_fit(config: Config, model: nn.Module, splits: Splits, task: Task, world: World) -> None:
    """Checks the targets, and runs the model on two rows of the data in eval and train mode. Leaves it as it is.

    The task is shown the model (`Task.for_model`).

    Collective: ranks whose data are random take rank 0's rows.

    Raises:
        ConfigError: an augmentation would move the images but not their masks, or mix what is not one image.
        DataError: the targets do not suit the task, or the model's outputs do not fit the data.
        ModelError: the model does not take the inputs, or returns what the task does not take, its parameters are not
            float32, it calls operators that no exported program may hold, or its train() or eval() does not return it.
    """
    read = read_both(config, splits, task)
    _require_pixels(config, splits)
    take_one_example(splits, world)
    inputs = _on(world, splits.example(EXAMPLE_ROWS))
    sizes = {tuple(leaf.shape[1:][-2:]) for leaf in leaves(inputs)}
    for batch in read.values():
        if any(leaf.dim() > 2 and tuple(leaf.shape[-2:]) in sizes for leaf in leaves(batch.targets)):
            _require_masks_follow(config.data, splits.train, "masks")
    if task.targets_follow_pixels:
        _require_masks_follow(config.data, splits.train, "places in the image")
    _require_mixable(config, inputs, task, [batch.targets for batch in read.values()])
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is a TorchScript program, which can be neither tried without changing it nor quantized",
            "return the torch.nn.Module, without torch.jit.script or torch.jit.trace",
        )
    for mode in ("train", "eval"):
        if getattr(model, mode)() is not model:
            raise ModelError(
                f"{mode}() of {type(model).__name__} does not return the model, as torch.nn.Module's does",
                f"end it with `return super().{mode}({'mode' if mode == 'train' else ''})`, or `return self`",
            )
    _require_arguments(config, model, inputs)
    with ForeignOperators() as operators:
        given = forward(config, model.eval(), inputs)
    forward_longest(config, model, inputs, splits.train, world)
    task.for_model(model, inputs)
    if config.export.postprocess and "export" in config.stages and "detector" not in task.described():
        message = f"makes boxes of a detector's outputs, and the task {config.task.name} describes no detector"
        raise ConfigError([Problem("export.postprocess", message, hint="--export.postprocess false")])
    outputs = task.pick(in_float(given, EXAMPLE_ROWS, EXAMPLE_ROWS))
    _require_programs(config, operators.found)
    task.check_outputs(outputs)
    _require_rows_first(config, model, inputs, outputs, task)
    normalize = Normalization(splits.mean, splits.std)
    for name, batch in read.items():
        rows = min(EXAMPLE_ROWS, len(batch.ids))
        if splits.collate_of(getattr(splits, name)) is None:
            found = task.pick(in_float(given, EXAMPLE_ROWS, rows))
        else:  # whose lengths are not those of the example
            real = map_leaves(lambda leaf: normalize(leaf) if leaf.dtype == torch.uint8 else leaf, batch.inputs)
            found = task.pick(in_float(forward(config, model, _on(world, real)), len(batch.ids), rows))
        _require_fit(config, task, found, _on(world, take(batch.targets, slice(rows))), rows)
    # In train mode, on copies of the buffers, because batch norms update theirs.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = arguments(inputs)
    trained = torch.func.functional_call(model.train(), buffers, args, kwargs)
    try:
        task.pick(in_float(trained, EXAMPLE_ROWS, EXAMPLE_ROWS))
    except ModelError as error:
        raise ModelError(f"while training, {error.message}", f"{error.hint}, in train mode, too") from None
    model.eval()


def _require_rows_first(config: Config, model: nn.Module, inputs: Tree, outputs: Any, task: Task) -> None:
    """Refuses outputs whose rows are not their leading dimension, as [classes, B], which looks right for two classes.

    Tried with one row more where the shapes for two leave that open.
    """
    tensors = [leaf for leaf in leaves(outputs) if isinstance(leaf, Tensor)]
    if not any(len(leaf) == EXAMPLE_ROWS and EXAMPLE_ROWS in leaf.shape[1:] for leaf in tensors if leaf.dim()):
        return
    rows = EXAMPLE_ROWS + 1
    more = forward(config, model, take(inputs, [row % EXAMPLE_ROWS for row in range(rows)]))
    for (name, leaf), two in zip(named_leaves(task.pick(in_float(more, rows, rows)), "outputs"), tensors, strict=False):
        if isinstance(leaf, Tensor) and len(leaf) == EXAMPLE_ROWS and rows in leaf.shape[1:]:
            shapes = f"{list(two.shape)} for {EXAMPLE_ROWS} samples and {list(leaf.shape)} for {rows}"
            raise ModelError(
                f"the model's {name} have shape {shapes}: rows are not the leading dimension",
                "return them with the batch first, as by outputs.T or outputs.transpose(0, 1)",
            )


def _on(world: World, tree: Tree) -> Tree:
    return map_leaves(lambda leaf: leaf.to(world.device), tree)


def _require_mixable(config: Config, inputs: Tree, task: Task, targets: Sequence[Tree]) -> None:
    """Refuses mixup and cutmix of inputs that are not one tensor of floats, and of losses that are not one a sample."""
    mix = config.data.mix
    if not (mix.mixup or mix.cutmix) or "train" not in config.stages:
        return
    found = ""
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        listed = (f"{name or 'a tensor'} ({short(leaf.dtype)})" for name, leaf in named_leaves(inputs))
        found = f"mixes inputs that are one tensor of floats, and the data's are {', '.join(listed)}"
    elif task.sums_losses:
        found = f"mixes the losses of samples, and the task {config.task.name} sums them (summed_loss)"
    elif mix.cutmix and not all(isinstance(each, Tensor) for each in targets):
        found = "cutmix is for images with one target each, and the data's targets are a tree"
    if found:
        place = "data.mix.mixup" if mix.mixup else "data.mix.cutmix"
        raise ConfigError([Problem(place, found, hint="--data.mix.mixup 0 --data.mix.cutmix 0")])


def _require_arguments(config: Config, model: nn.Module, inputs: Tree) -> None:
    """Refuses a tree of inputs that the model's forward does not take, by the names or the number of its leaves."""
    if isinstance(inputs, Tensor):
        return
    args, kwargs = arguments(inputs)
    try:
        signature = inspect.signature(model.forward)
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"by name: {', '.join(kwargs)}" if kwargs else f"by position: {len(args)} of them"
        raise ModelError(
            f"forward of the model {config.model.name} takes {signature}, and the data gives its inputs {given}: "
            f"{first_line(error)}",
            "give the dict's keys the names of forward's arguments, or the tuple their order",
        ) from None
    except ValueError:  # no signature can be told
        return


def _require_pixels(config: Config, splits: Splits) -> None:
    """Refuses `export.input: uint8` for data that are no uint8 images with a known normalization."""
    if config.export.input != "uint8" or "export" not in config.stages:
        return
    assert splits.eval is not None
    first = None
    if not isinstance(splits.eval, ImageArrays):
        first = first_batch(splits.eval, collate=splits.collate_of(splits.eval))
    found = ""
    if first is not None and not isinstance(first.inputs, Tensor):
        found = f"{name_of(splits.eval)} gives several tensors"
    elif first is not None and first.inputs.dtype != torch.uint8:
        found = f"{name_of(splits.eval)} gives {str(first.inputs.dtype)[6:]}"
    elif len(splits.input_shape) != 3 or not len(splits.mean) == len(splits.std) == splits.input_shape[0]:
        found = f"inputs have shape {list(splits.input_shape)}, and Splits.mean has {len(splits.mean)} values"
    if found:
        message = f"'uint8' is for data of uint8 images [C, H, W] with Splits.mean and Splits.std, but {found}"
        raise ConfigError([Problem("export.input", message, hint="--export.input float, or return such images")])


def _require_programs(config: Config, foreign: Mapping[str, str]) -> None:
    """Refuses operators that no exported program may hold, unless nothing is exported."""
    foreign = {name: layer for name, layer in foreign.items() if not is_trusted(name)}
    if foreign and _WRITING.intersection(config.stages):
        operator, layer = next(iter(foreign.items()))
        raise ModelError(
            f"{layer or 'the model'} calls {operator}, which is no operator of torch's own: programs that hold others "
            "are refused when they are opened, as they may do more than compute",
            f"compute it with torch's operators; or, if you trust it, --export.operators '{{\"{operator}\": MODULE}}' "
            "with the module that registers it; or only train: --stages '[train]'",
        )


def _require_masks_follow(data: DataConfig, train: ImageArrays | Dataset[Any], targets: str) -> None:
    """Refuses augmentations that move pixels, as targets in the image are not moved along, but by the dataset itself.

    targets: what they are, for the message.
    """
    later = data.augment[getattr(train, "own_steps", 0) :]
    moving = [step.name for step in later if step.name in _MOVING] + (["cutmix"] if data.mix.cutmix else [])
    if moving:
        message = f"{', '.join(moving)} would move the images' pixels, but not the targets, which are {targets}"
        hint = "remove it (color_jitter and random_erasing are safe), or move both in a map-style dataset's __getitem__"
        raise ConfigError([Problem("data.augment" if data.augment else "data.mix.cutmix", message, hint=hint)])


def _require_fit(config: Config, task: Task, outputs: Any, targets: Tree, rows: int) -> None:
    """Checks that the loss of outputs and real targets can be computed; masks, for example, need the outputs' size."""
    # Asked of the class: an operation without a kernel raises NotImplementedError, too.
    if not task.sums_losses and type(task).loss is Task.loss:
        raise DataError(
            f"the task {config.task.name} has neither a loss of each sample nor a summed one",
            "define loss(outputs, targets), float [B]; or summed_loss, their sum and its count",
        )
    try:
        losses = task.summed_loss(outputs, targets)[0] if task.sums_losses else task.loss(outputs, targets)
    except (RuntimeError, ValueError) as error:
        if not is_ours(registry.tasks.entry(config.task.name)):
            raise
        raise DataError(
            f"outputs {_shape(outputs)} of the model and targets {_shape(targets)} of the data do not fit: "
            f"{first_line(error)}",
            "let the dataset give targets of the outputs' size, or choose another --task.name",
        ) from error
    if tuple(losses.shape) != (() if task.sums_losses else (rows,)):
        kind = "summed loss" if task.sums_losses else "loss"
        raise DataError(
            f"the {kind} of the task {config.task.name} has shape {list(losses.shape)} for {rows} samples",
            "return the sum of the losses, float [], and their count"
            if task.sums_losses
            else 'return one loss per sample, float [B]: use reduction="none", then the mean of each sample',
        )


def _shape(tree: Any) -> str:
    return str(list(tree.shape)) if isinstance(tree, Tensor) else "of a tree"
