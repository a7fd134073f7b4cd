"""Checks the first items of both splits: against each other, the task, and what the dataset states of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.data import CLASS_BALANCED
from dist_train.config.tree import Config
from dist_train.data.alike import require_alike
from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.columns import TARGETS, column
from dist_train.data.first_items import first_batch, require_order
from dist_train.data.items import name_of, rows_in
from dist_train.data.splits import Splits
from dist_train.errors import DataError
from dist_train.pipeline.same_data import EXAMPLE_ROWS
from dist_train.tasks import Classification, Task
from dist_train.trees import named_leaves

_COMPARED = 16  # items whose classes are compared with what their dataset says without reading them


def read_both(config: Config, splits: Splits, task: Task) -> dict[str, Batch]:
    """Checks the items of both splits: all targets of image arrays, else of the items that `_read` returns.

    Returns:
        These items by the split's name.

    Raises:
        DataError: they do not suit the task, differ in kind, are not what the dataset states, or `collate` moves them.
    """
    read = dict[str, Batch]()
    for name in ("train", "eval"):
        split = getattr(splits, name)
        asked = _classes_asked(config, task) if name == "train" else ""
        batch = _read(splits, split, task, _COMPARED if asked else 3)
        if batch is None:
            continue
        if isinstance(split, ImageArrays):
            task.check_targets(split.targets)
        else:
            _require_stated(splits, name, batch)
            if (collate := splits.collate_of(split)) is not None:
                require_order(split, collate)
        read[name] = batch
        if asked:
            _require_true_classes(asked, split, batch, task)
    if len(read) == 2:
        train, evaluation = (f"Splits.{name} ({name_of(getattr(splits, name))})" for name in read)
        collated = splits.collate_of(splits.eval) is not None
        require_alike(read["train"], read["eval"], train, evaluation, splits.dynamic, collated)
    return read


def _read(splits: Splits, split: ImageArrays | Dataset[Any], task: Task, count: int) -> Batch | None:
    """Returns the first rows of image arrays or one of a stream; of a map-style dataset `count`, from first to last.

    Labels often come in order, so the last item tells of classes that are counted from 1.
    """
    if isinstance(split, ImageArrays):
        return split.gather(torch.arange(min(EXAMPLE_ROWS, len(split))))
    further: tuple[int, ...] = ()
    if not isinstance(split, IterableDataset):
        rows = rows_in(split)
        further = tuple(dict.fromkeys(min(rows - 1, rows * place // (count - 1)) for place in range(1, count)))
    return first_batch(split, task.check_targets, further, splits.collate_of(split))


def _require_stated(splits: Splits, name: str, first: Batch) -> None:
    """Checks items that are alike against what their dataset and Splits state about them."""
    split = getattr(splits, name)
    stated = getattr(split, "input_shape", None)
    item = f"item {int(first.ids[0])} of {name_of(split)}"
    for leaf, tensor in named_leaves(first.inputs):
        shape, what = tuple(tensor.shape[1:]), f"inputs.{leaf} of {item}" if leaf else item
        if not leaf and stated is not None and tuple(stated) != shape:
            raise DataError(
                f"{what} has the shape {list(shape)}, and the dataset states input_shape {tuple(stated)}",
                f"input_shape = {shape}",
            )
        known = len(shape) == 3 and len(splits.mean) == len(splits.std) == shape[0]
        if tensor.dtype == torch.uint8 and not known:
            hint = "Splits(..., mean=(0.5,), std=(0.5,)) with a number for each channel; or return finished floats"
            if len(shape) != 3:
                hint = "return .long() for ids, .bool() for a mask, .float() for numbers"
            raise DataError(
                f"{what} is uint8 {list(shape)}: uint8 images [C, H, W] are normalized with Splits.mean and Splits.std "
                f"of each channel, which have {len(splits.mean)} and {len(splits.std)}",
                hint,
            )


def _classes_asked(config: Config, task: Task) -> str:
    """Returns the setting that needs each training row's class without reading its item; "" where none does."""
    sampling, split = config.data.sampling, config.data.split
    if _weighted(task):
        return "task.args.class_weights balanced"
    if sampling is not None and sampling.weights == CLASS_BALANCED:
        return f"data.sampling.weights {CLASS_BALANCED}"
    return "data.split.by class" if split is not None and split.by == "class" else ""


def _weighted(task: Task) -> bool:
    return isinstance(task, Classification) and task.wants_classes


def _require_true_classes(setting: str, train: ImageArrays | Dataset[Any], read: Batch, task: Task) -> None:
    """Refuses a column of classes, by which rows are drawn, divided or weighted, that is not the items' own targets.

    For drawing and dividing it may name the classes otherwise, as before a target_transform, but one to one.
    """
    targets = read.targets
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        return  # what the classes are of them cannot be told
    found = None if isinstance(train, (ImageArrays, IterableDataset)) else column(train, TARGETS)
    if found is None or found.ndim != 1:
        return  # it cannot differ, or is refused where it is used
    said, own = found[read.ids.numpy()].tolist(), targets.tolist()
    renamed = len(set(said)) == len(set(own)) == len(set(zip(said, own, strict=True)))
    if said == own or (renamed and not _weighted(task)):
        return
    rows = [each for each in zip(read.ids.tolist(), said, own, strict=True) if each[1] != each[2]]
    raise DataError(
        f"{setting} takes the class of each row from `targets` (or `labels`) of {name_of(train)}, and they are not "
        f"those of its items: {'; '.join(f'row {row} {there}, item {row} {here}' for row, there, here in rows[:3])}",
        "let `targets` hold the class that __getitem__ returns of each row, in the same order",
    )
