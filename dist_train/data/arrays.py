"""Image datasets as memory-mapped arrays: written once on a node, named by their content, shared by its processes."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_train.errors import DataError
from dist_train.world import World

_PARTS = ("images", "targets", "ids")
_TARGETS = (torch.int64, torch.uint8, torch.float32)


@dataclass(frozen=True)
class Batch:
    """Rows of a dataset: `ids` int64 [B] as they are stored with the rows, `inputs` [B, ...], `targets` [B, ...].

    `missing`: places, among the rows that were asked for, of those that could not be decoded and are not here.
    """

    ids: Tensor
    inputs: Tensor
    targets: Tensor
    missing: tuple[int, ...] = ()


class ImageArrays:
    """Images with their targets and ids, in memory or memory-mapped.

    Attributes:
        images: uint8 [N, C, H, W], contiguous; N >= 1.
        targets: [N, ...], int64, uint8 or float32; as the task takes them, for example int64 [N] class indices, or uint8
            [N, H, W] masks.
        ids: int64 [N], 0..N-1 unless given. A row keeps its id wherever it goes, so that a ledger can tell which rows
            entered forward.

    Raises:
        DataError: wrong dtypes or shapes, or no rows.
    """

    def __init__(self, images: Tensor, targets: Tensor, ids: Tensor | None = None) -> None:
        ids = torch.arange(len(images)) if ids is None else ids
        if images.dtype != torch.uint8 or images.dim() != 4 or not images.numel():
            raise DataError(f"images must be uint8 [N, C, H, W] with N >= 1, not {images.dtype} {list(images.shape)}")
        if targets.dtype not in _TARGETS or targets.shape[:1] != images.shape[:1] or not targets.numel():
            raise DataError(
                f"targets must be int64, uint8 or float32 [{len(images)}, ...], not {targets.dtype} {list(targets.shape)}"
            )
        if ids.dtype != torch.int64 or ids.shape != images.shape[:1]:
            raise DataError(f"ids must be int64 [{len(images)}], not {ids.dtype} {list(ids.shape)}")
        self.images, self.targets, self.ids = images.contiguous(), targets.contiguous(), ids.contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: npt.NDArray[np.int64] | Tensor) -> Batch:
        """Copies of the rows at these places: int64 [B], each in range(len(self)), else IndexError."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"rows must lie in range({len(self)}), got {int(index.min())}..{int(index.max())}")
        ids, images, targets = (values.index_select(0, index) for values in (self.ids, self.images, self.targets))
        return Batch(ids, images, targets)

    def write(self, directory: Path) -> str:
        """Writes the arrays to a folder in `directory` and returns the folder's name, a hash of their content.

        Each file appears whole or not at all; files that hold these arrays already are left alone, damaged ones are
        replaced. Processes may write the same arrays at the same time.

        Raises:
            DataError: the files cannot be written.
        """
        parts = {part: getattr(self, part).numpy() for part in _PARTS}
        digest = hashlib.sha256()
        for part, array in parts.items():
            digest.update(f"{part} {array.dtype.str} {array.shape}\n".encode())
            digest.update(memoryview(array).cast("B"))
        name = digest.hexdigest()[:32]
        try:
            (directory / name).mkdir(parents=True, exist_ok=True)
            for part, array in parts.items():
                _write_whole(directory / name / f"{part}.npy", array)
        except OSError as error:
            message = f"cannot write the arrays of a dataset to {directory}: {error}"
            raise DataError(message, "--data.cache_dir FOLDER, one with room on each node") from error
        return name

    @classmethod
    def open(cls, path: Path) -> "ImageArrays":
        """Memory-maps a folder that `write` made; processes of a node share its pages.

        Raises:
            DataError: a file is missing or damaged.
        """
        try:
            # Copy-on-write: torch has no read-only tensors, and a stray write must not reach the file.
            arrays = {part: torch.from_numpy(np.load(path / f"{part}.npy", mmap_mode="c")) for part in _PARTS}
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"the stored dataset {path} is damaged: {error}", f"rm -r {path}") from error
        return cls(**arrays)


def _write_whole(path: Path, array: npt.NDArray[Any]) -> None:
    if _holds(path, array):
        return
    descriptor, beside = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)


def _holds(path: Path, array: npt.NDArray[Any]) -> bool:
    """Whether the file holds this array, compared by its bytes: a name alone would trust a damaged disk."""
    try:
        stored = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return stored.dtype == array.dtype and np.array_equal(stored, array)


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
