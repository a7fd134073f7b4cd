"""Splits: a dataset's training and evaluation parts, opened once on each node."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.augment.normalize import Normalization
from dist_train.data.dynamic import Dynamic, plain_dynamic, require_there
from dist_train.data.first_items import example_rows, first_batch
from dist_train.data.items import name_of, rows_in, short
from dist_train.data.stack import Collate
from dist_train.errors import DataError
from dist_train.trees import Tree, leaves, map_leaves, named_leaves, structure_of


def describe_data(splits: Splits) -> dict[str, Any]:
    """Describes the data for a model that was trained on it: inputs, normalization, classes; JSON.

    `inputs` lists the leaves as the model takes them: name, shape with None for the batch and other dimensions that
    vary, dtype. `structure` is that of `trees.structure_of`. `input_shape` is None for inputs of several tensors.
    """
    example = splits.example(2)
    inputs = []
    for name, leaf in named_leaves(example):
        vary = splits.dynamic.get(name, {})
        shape = [None if at in vary else size for at, size in enumerate(leaf.shape[1:], start=1)]
        inputs.append({"name": name, "shape": [None, *shape], "dtype": short(leaf.dtype)})
    return {
        "input_shape": list(splits.input_shape) if len(inputs) == 1 and not inputs[0]["name"] else None,
        "inputs": inputs,
        "structure": structure_of(example),
        "dynamic": {leaf: {str(at): name for at, name in vary.items()} for leaf, vary in splits.dynamic.items()},
        "resize": splits.resize,
        "mean": list(splits.mean),
        "std": list(splits.std),
        "classes": list(splits.classes),
        "num_outputs": splits.num_outputs,
    }


@dataclass(frozen=True)
class Splits:
    """A dataset: data to train and to evaluate on, and its description for the model.

    Attributes:
        train, eval: image arrays, or map-style datasets of pairs (inputs, targets), each a tensor, a number, or a dict
            or tuple of them. `train` may be an iterable dataset of such pairs, with the guarantees of data/stream.py.
            `eval` may be None where `data.split` makes it of rows of `train`.
        num_classes: classes or labels; class indices lie in range(num_classes). 0 where targets are numbers.
        classes: names of the classes, in order; empty where there are none.
        mean, std: per channel, for pixels on the scale 0..1; inputs are normalized with them.
        num_outputs: width of the model's outputs; num_classes unless given, for example for regression.
        resize: pixels of an image file's shorter edge before the centre is cut out; None: not scaled.
        steps_per_epoch: global batches of an epoch, for an iterable dataset; a map-style one has a length.
        whole: rows of the dataset of which `data.split` made both parts; None: it did not.
        fingerprint: identifies the content, so that a run is not resumed on other data; set by `open_splits`.
        collate: makes (inputs, targets) of a batch from a list of items as the datasets give them, such as texts of
            unlike lengths; a dataset's own method `collate` does the same. None: tensors of one shape are stacked.
            It runs where the items are read, in worker processes. What it pads depends on the rows of a batch, and so
            on the number of ranks: a model that masks the padding gives the same losses.
        dynamic: dimensions of the inputs that vary from batch to batch, besides the batch itself, by leaf and place:
            {"input_ids": {1: "sequence"}}; the place counts the batch as 0. The leaf of a single tensor is "".

    Raises:
        DataError: image arrays that contradict the other fields.
    """

    train: ImageArrays | Dataset[Any]
    eval: ImageArrays | Dataset[Any] | None
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    num_outputs: int = 0
    resize: int | None = None
    steps_per_epoch: int | None = None
    whole: int | None = None
    fingerprint: str = ""
    collate: Collate | None = None
    dynamic: Dynamic = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_lengths(self)
        self._check_collate()
        self._take_numbers()
        if not self.num_outputs:
            if self.num_classes < 1:
                message = "a dataset must state the width of the model's outputs"
                raise DataError(message, "num_classes=..., or num_outputs=...")
            object.__setattr__(self, "num_outputs", self.num_classes)
        if self.classes and len(self.classes) != self.num_classes:
            raise DataError(f"a dataset of {self.num_classes} classes names {len(self.classes)} of them")
        for name in ("train", "eval"):
            split = getattr(self, name)
            if not isinstance(split, ImageArrays):
                continue
            if not split.targets.is_floating_point() and split.targets.dim() == 1:
                self._require_class_indices(name, split.targets)
            channels = split.images.shape[1]
            if not len(self.mean) == len(self.std) == channels:
                stated = f"mean has {len(self.mean)}, std {len(self.std)}"
                raise DataError(f"{name} images have {channels} channels, but {stated}")

    def _take_numbers(self) -> None:
        """Makes plain numbers and tuples of the description, as NumPy and lists give them.

        Raises:
            DataError: a number of classes or outputs is none, or mean or std cannot be one of pixels in 0..1.
        """
        for name in ("num_classes", "num_outputs"):
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, index(given))
            except TypeError:
                raise DataError(
                    f"Splits.{name} is {given!r}, not a whole number", f"{name}=len(classes), or int(...)"
                ) from None
        for name in ("mean", "std"):
            given = getattr(self, name)
            try:
                values = tuple(float(value) for value in given)
            except (TypeError, ValueError):
                raise DataError(
                    f"Splits.{name} is {given!r}, not a number for each channel", f"{name}=(0.5,) for one channel"
                ) from None
            if not all(0 <= value <= 1 if name == "mean" else 0 < value < inf for value in values):
                raise DataError(
                    f"Splits.{name} is {values}: it normalizes pixels on the scale 0..1, so that a mean lies in 0..1 "
                    "and a std above 0",
                    f"divide a {name} of pixels in 0..255 by 255",
                )
            object.__setattr__(self, name, values)
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))

    def _check_collate(self) -> None:
        """Raises DataError where `collate` has nothing to make, or `dynamic` is not {leaf: {dimension: name}}."""
        if self.collate is not None:
            if not callable(self.collate):
                message = f"Splits.collate is a {type(self.collate).__name__}, not a function"
                raise DataError(message, "give a function of a list of items (input, target)")
            arrays = [name for name in ("train", "eval") if isinstance(getattr(self, name), ImageArrays)]
            if arrays:
                message = f"Splits.collate makes batches of items, and Splits.{arrays[0]} is ImageArrays"
                raise DataError(message, "leave collate out, or give map-style datasets")
        object.__setattr__(self, "dynamic", plain_dynamic(self.dynamic))

    def collate_of(self, split: ImageArrays | Dataset[Any] | None) -> Collate | None:
        """Returns `collate`, or the dataset's own method of that name; None where tensors are stacked."""
        if self.collate is not None or isinstance(split, ImageArrays):
            return self.collate
        own: Collate | None = getattr(split, "collate", None)
        return own if callable(own) else None

    def example(self, rows: int) -> Tree:
        """Returns inputs of the first training items that can be decoded, as the model takes them, on the CPU.

        They are normalized, not augmented, and repeated where there are fewer; read once. The leaves are contiguous.

        Raises:
            DataError: none of the first items can be decoded; or `dynamic` names a leaf or dimension that is not there.
        """
        if rows not in self._examples:
            normalize = Normalization(self.mean, self.std)
            made = example_rows(self.train, rows, normalize, self.collate_of(self.train))
            require_there(self.dynamic, made)
            self._examples[rows] = made
        return map_leaves(torch.clone, self._examples[rows])  # a model may change its inputs in place

    @cached_property
    def _examples(self) -> dict[int, Tree]:
        return {}

    def take_example(self, rows: int, example: Tree) -> None:
        """Replaces the example of that many rows, as with that of rank 0."""
        self._examples[rows] = example

    @property
    def in_channels(self) -> int:
        """Channels of the inputs for a model that asks: the first dimension of a tensor, or of the first image."""
        if self.input_shape:
            return self.input_shape[0]
        first = self._first
        return next((leaf.shape[1] for leaf in leaves(first.inputs) if leaf.dim() == 4), 1) if first else 1

    def _require_class_indices(self, name: str, targets: Tensor) -> None:
        if self.num_classes < 2:
            message = f"classification needs two classes, and the dataset has {self.num_classes}"
            raise DataError(message, "num_classes >= 2")
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(f"{name} targets must lie in range({self.num_classes}), got {low}..{high}")

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a row, such as (C, H, W), from the training dataset's `input_shape` or its first item.

        () for inputs of several tensors.

        Raises:
            DataError: the first item cannot be read, or is not (inputs, targets).
        """
        if isinstance(self.train, ImageArrays):
            return tuple(self.train.images.shape[1:])
        stated = getattr(self.train, "input_shape", None)
        if stated is not None:
            return tuple(stated)
        first = self._first
        if first is None:
            raise DataError(
                f"none of the first items of {name_of(self.train)} can be decoded, and it has no `input_shape`",
                "give the dataset that attribute, such as (3, 224, 224)",
            )
        return tuple(first.inputs.shape[1:]) if isinstance(first.inputs, Tensor) else ()

    @cached_property
    def _first(self) -> Batch | None:
        assert not isinstance(self.train, ImageArrays)
        return first_batch(self.train, collate=self.collate_of(self.train))


def _check_lengths(splits: Splits) -> None:
    """Raises DataError where a split is empty, is no dataset, or its length is not known."""
    for name in ("train", "eval"):
        split = getattr(splits, name)
        if split is None and name == "eval":
            continue
        if not isinstance(split, (ImageArrays, IterableDataset)) and not hasattr(split, "__getitem__"):
            raise DataError(
                f"Splits.{name} is a {type(split).__name__}, not a dataset",
                "give ImageArrays or a torch.utils.data.Dataset, without a DataLoader around it",
            )
    streamed = isinstance(splits.train, IterableDataset)
    if isinstance(splits.eval, IterableDataset):
        raise DataError(
            "the evaluation set is an iterable dataset: nothing could show that each sample was counted once",
            "give a map-style dataset or ImageArrays as Splits.eval",
        )
    if streamed != (splits.steps_per_epoch is not None) or (streamed and not splits.steps_per_epoch):
        raise DataError(
            "Splits.steps_per_epoch, at least 1, is required for an iterable training set and forbidden for others",
            "Splits(..., steps_per_epoch=1000)",
        )
    for name, what in (("train", "train on"), ("eval", "evaluate")):
        split = getattr(splits, name)
        if split is not None and not isinstance(split, IterableDataset) and rows_in(split) == 0:
            raise DataError(f"the dataset has nothing to {what}: Splits.{name} is empty", "give it at least one sample")
