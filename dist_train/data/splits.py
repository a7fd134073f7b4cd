"""A dataset: its training and evaluation splits, and the way to open it once on each node."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_train.data.arrays import ImageArrays
from dist_train.distributed.world import World
from dist_train.errors import DataError


def describe_data(splits: Splits) -> dict[str, Any]:
    """What a model must be told of the data that it was trained on; JSON."""
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
    """A dataset: what to train on, what to evaluate on, and what a model must know about it.

    Attributes:
        train, eval: image arrays, or map-style datasets of (input tensor, target) pairs; `train` may be an iterable dataset of
            such pairs, with what data/stream.py promises.
        num_classes: classes or labels; class indices lie in range(num_classes). 0 where targets are numbers.
        classes: their names, in order; empty where there are none.
        mean, std: of each channel, for pixels on the scale 0..1; what inputs are normalized with.
        num_outputs: width of the model's outputs; num_classes unless given, as for regression.
        resize: to how many pixels the shorter edge of an image file is scaled before the centre is cut out; None: it is not.
        steps_per_epoch: global batches of an epoch, for an iterable dataset; a map-style one knows its length.
        fingerprint: of the content, so that a run is not resumed on other data; set by `open_splits`.

    Raises:
        DataError: image arrays that contradict the rest.
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
                raise DataError("a dataset must say what a model puts out", "num_classes=..., or num_outputs=...")
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
            raise DataError(f"a dataset of {self.num_classes} classes has nothing to tell apart", "num_classes >= 2")
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(f"{name} targets must lie in range({self.num_classes}), got {low}..{high}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W), as the training dataset's `input_shape` or its first item says; raises DataError where a map-style dataset does not give (tensor, target)."""
        if isinstance(self.train, ImageArrays):
            return tuple(self.train.images.shape[1:])
        stated = getattr(self.train, "input_shape", None)
        if stated is not None:
            return tuple(stated)
        sample = next(iter(self.train)) if isinstance(self.train, IterableDataset) else self.train[0]
        if not isinstance(sample, (tuple, list)) or not isinstance(sample[0], Tensor):
            hint = "end its transforms with torchvision.transforms.v2.ToImage()"
            raise DataError(f"{type(self.train).__name__}[0] must be (tensor, target), not {type(sample)}", hint)
        return tuple(sample[0].shape)


def _check_lengths(splits: Splits) -> None:
    """Raises DataError where there is nothing to train on or to evaluate, or where a length is not known."""
    streamed = isinstance(splits.train, IterableDataset)
    if isinstance(splits.eval, IterableDataset):
        raise DataError(
            "the evaluation set is an iterable dataset: whether each sample was counted once could not be told",
            "give a map-style dataset or ImageArrays as Splits.eval",
        )
    if streamed != (splits.steps_per_epoch is not None) or (streamed and not splits.steps_per_epoch):
        raise DataError(
            "an iterable training set needs Splits.steps_per_epoch, at least 1, and only such a one takes it",
            "Splits(..., steps_per_epoch=1000)",
        )
    for name, what in (("train", "train on"), ("eval", "evaluate")):
        split = getattr(splits, name)
        if not isinstance(split, IterableDataset) and len(split) == 0:
            raise DataError(f"the dataset has nothing to {what}: Splits.{name} is empty", "give it at least one sample")


def open_splits(make: Callable[[], Splits], directory: Path, world: World) -> Splits:
    """The dataset on every rank, its image arrays memory-mapped from one copy on each node.

    The first rank of each node calls `make` and writes the arrays; the others map what it wrote. Where a split is not
    made of image arrays every rank calls `make` itself, the first one of its node before the others, so that a download
    happens once.

    Args:
        make: loads the dataset.
        directory: a folder of the node.
        world: the ranks of this run.

    Raises:
        DataError: the dataset cannot be loaded or stored; on the other ranks a PeerError.
    """
    made: list[Splits] = []

    def write() -> dict[str, Any] | None:
        splits = make()
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
        splits = made[0] if made else make()
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


def _fingerprint(split: ImageArrays | Dataset[Any]) -> str:
    """What a dataset says of its content by an attribute `fingerprint`, else its length; "stream" where it has none."""
    stated = getattr(split, "fingerprint", None)
    if stated is not None:
        return str(stated)
    return "stream" if isinstance(split, IterableDataset) else str(len(cast(Sized, split)))
