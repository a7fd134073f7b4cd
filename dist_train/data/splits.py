"""Splits: a dataset's training and evaluation parts, opened once on each node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_train.data.arrays import ImageArrays
from dist_train.data.items import name_of, reading, rows_in
from dist_train.data.stack import first_batch
from dist_train.distributed.world import World
from dist_train.errors import DataError


def describe_data(splits: Splits) -> dict[str, Any]:
    """Describes the data for a model that was trained on it: input shape, normalization, classes; JSON."""
    return {
        "input_shape": list(splits.input_shape),
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
        train, eval: image arrays, or map-style datasets of (input tensor, target) pairs. `train` may be an iterable
            dataset of such pairs, with the guarantees of data/stream.py.
        num_classes: classes or labels; class indices lie in range(num_classes). 0 where targets are numbers.
        classes: names of the classes, in order; empty where there are none.
        mean, std: per channel, for pixels on the scale 0..1; inputs are normalized with them.
        num_outputs: width of the model's outputs; num_classes unless given, for example for regression.
        resize: pixels of an image file's shorter edge before the centre is cut out; None: not scaled.
        steps_per_epoch: global batches of an epoch, for an iterable dataset; a map-style one has a length.
        fingerprint: identifies the content, so that a run is not resumed on other data; set by `open_splits`.

    Raises:
        DataError: image arrays that contradict the other fields.
    """

    train: ImageArrays | Dataset[Any]
    eval: ImageArrays | Dataset[Any]
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    num_outputs: int = 0
    resize: int | None = None
    steps_per_epoch: int | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        _check_lengths(self)
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

    def _require_class_indices(self, name: str, targets: Tensor) -> None:
        if self.num_classes < 2:
            message = f"classification needs two classes, and the dataset has {self.num_classes}"
            raise DataError(message, "num_classes >= 2")
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(f"{name} targets must lie in range({self.num_classes}), got {low}..{high}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W), from the training dataset's `input_shape` or its first item.

        Raises:
            DataError: the first item cannot be read, or is not (tensor, target).
        """
        if isinstance(self.train, ImageArrays):
            return tuple(self.train.images.shape[1:])
        stated = getattr(self.train, "input_shape", None)
        if stated is not None:
            return tuple(stated)
        first = first_batch(self.train)
        if first is None:
            raise DataError(
                f"none of the first items of {name_of(self.train)} can be decoded, and it has no `input_shape`",
                "give the dataset that attribute, such as (3, 224, 224)",
            )
        return tuple(first.inputs.shape[1:])


def _check_lengths(splits: Splits) -> None:
    """Raises DataError where a split is empty, is no dataset, or its length is not known."""
    for name in ("train", "eval"):
        split = getattr(splits, name)
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
        if not isinstance(split, IterableDataset) and rows_in(split) == 0:
            raise DataError(f"the dataset has nothing to {what}: Splits.{name} is empty", "give it at least one sample")


def open_splits(make: Callable[[], Splits], directory: Path, world: World, name: str = "data") -> Splits:
    """Opens the dataset on every rank, its image arrays memory-mapped from one copy per node.

    The first rank of each node calls `make` and writes the arrays; the others map them. Where a split is not made of
    image arrays, every rank calls `make` itself. The first rank of a node goes before the others, so that files are
    downloaded once.

    Args:
        make: loads the dataset.
        directory: a folder of the node.
        world: the ranks of this run.
        name: of the dataset, for messages.

    Raises:
        DataError: the dataset cannot be loaded or stored; the other ranks raise PeerError.
    """
    made: list[Splits] = []

    def write() -> dict[str, Any] | None:
        splits = _made(make, name)
        if not isinstance(splits.train, ImageArrays) or not isinstance(splits.eval, ImageArrays):
            made.append(splits)
            return None
        return {
            "train": splits.train.write(directory),
            "eval": splits.eval.write(directory),
            "num_classes": splits.num_classes,
            "num_outputs": splits.num_outputs,
            "classes": list(splits.classes),
            "mean": list(splits.mean),
            "std": list(splits.std),
            "resize": splits.resize,
        }

    stored = world.first_on_node(write, "loading the dataset")
    if stored is None:
        splits = made[0] if made else _made(make, name)
        return replace(splits, fingerprint=" ".join(_fingerprint(split) for split in (splits.train, splits.eval)))
    return Splits(
        train=ImageArrays.open(directory / stored["train"]),
        eval=ImageArrays.open(directory / stored["eval"]),
        num_classes=stored["num_classes"],
        num_outputs=stored["num_outputs"],
        classes=tuple(stored["classes"]),
        mean=tuple(stored["mean"]),
        std=tuple(stored["std"]),
        resize=stored["resize"],
        fingerprint=f"{stored['train']} {stored['eval']}",
    )


def _made(make: Callable[[], Splits], name: str) -> Splits:
    with reading(f"the dataset {name}"):
        splits: object = make()
    if not isinstance(splits, Splits):
        raise DataError(
            f"the function of the dataset {name} returned a {type(splits).__name__}, not Splits",
            "return dist_train.Splits(train, eval, num_classes)",
        )
    return splits


def _fingerprint(split: ImageArrays | Dataset[Any]) -> str:
    """Returns a dataset's attribute `fingerprint`, else its length; "stream" for an iterable one."""
    stated = getattr(split, "fingerprint", None)
    if stated is not None:
        return str(stated)
    return "stream" if isinstance(split, IterableDataset) else str(rows_in(split))
