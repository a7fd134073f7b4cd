"""`image_folder`: image files train/<class>/* and val/<class>/*, decoded and cropped to uint8 by worker processes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dist_train.config.data import DataConfig, RandAugment, RandomHorizontalFlip, RandomResizedCrop
from dist_train.data.datasets.args import read_args
from dist_train.data.image_file import EXTENSIONS, centre, is_image_name, read_image
from dist_train.data.image_listing import leads_back, list_images
from dist_train.data.splits import Splits
from dist_train.errors import ConfigError, DataError, Problem, escaped

# Mean and std of ImageNet-1k's training images on the scale 0..1; torchvision's weights were trained with them
# (https://docs.pytorch.org/vision/stable/models.html).
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolderArgs(BaseModel):
    """Arguments of `image_folder`.

    Attributes:
        size: pixels of an input's edge.
        resize: pixels of an evaluated image's shorter edge before the centre is cut out.
    """

    model_config = ConfigDict(extra="forbid")

    size: PositiveInt = 224
    resize: PositiveInt = 256

    @model_validator(mode="after")
    def _centre_lies_inside(self) -> ImageFolderArgs:
        if self.resize < self.size:
            raise ValueError(f"resize, {self.resize}, must be at least size, {self.size}, which is cut out of it")
        return self


class ImageFiles(Dataset[Any]):
    """Image files with their classes; an item is (uint8 RGB [3, size, size], class index).

    Args:
        names: paths under `folder`, in the order of their ids. There may be millions, so they are kept as one array of
            bytes, which worker processes share.
        targets: int64 [N].
        steps: the leading entries of data.augment that the workers apply.

    Raises:
        CorruptSampleError: by an item, where the file holds no image that can be decoded; names the file.
        DataError: by an item, where the file cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        targets: np.ndarray,
        args: ImageFolderArgs,
        steps: Sequence[Any],
        fingerprint: str,
    ) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._folder = folder
        self._names = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._targets = targets
        self._args = args
        self._cropped = not any(isinstance(step, RandomResizedCrop) for step in steps)
        self._transform = v2.Compose([_transform(step, args.size) for step in steps]) if steps else None
        self.own_steps = len(steps)
        self.input_shape = (3, args.size, args.size)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Returns the image's centre, after scaling its shorter edge to `resize` pixels, and its class."""
        return self._centre(read_image(self.path(index))), int(self._targets[index])

    def augmented(self, index: int, seed: int) -> tuple[torch.Tensor, int]:
        image = read_image(self.path(index))
        if self._transform is None or self._cropped:
            image = self._centre(image)
        if self._transform is not None:
            # The transforms draw from torch's CPU generator alone; seeding all generators costs as much as the flip.
            torch.default_generator.manual_seed(seed)
            image = self._transform(image)
        return image, int(self._targets[index])

    def path(self, index: int) -> Path:
        start = self._ends[index - 1] if index else 0
        return self._folder / os.fsdecode(self._names[start : self._ends[index]].tobytes())

    def _centre(self, image: torch.Tensor) -> torch.Tensor:
        return centre(image, self._args.size, self._args.size, self._args.resize)


def _transform(step: Any, size: int) -> v2.Transform:
    if isinstance(step, RandomResizedCrop):
        return v2.RandomResizedCrop(size, scale=step.scale, ratio=step.ratio, antialias=True)
    if isinstance(step, RandAugment):
        return v2.RandAugment(num_ops=step.num_ops, magnitude=step.magnitude)
    assert isinstance(step, RandomHorizontalFlip)
    return v2.RandomHorizontalFlip(step.p)


def worker_steps(augment: Sequence[Any]) -> list[Any]:
    """The leading entries of data.augment that workers apply; config/checks/data.py refuses such entries further on."""
    return list(
        takewhile(lambda step: isinstance(step, (RandomResizedCrop, RandomHorizontalFlip, RandAugment)), augment)
    )


def image_folder(data: DataConfig) -> Splits:
    """Images of data.root: train/<class>/* for training, val/<class>/* for evaluation; classes are sorted folder names.

    Images are scaled and cut as `ImageFolderArgs` says; for training, only if data.augment has no random_resized_crop.
    They are normalized with ImageNet's mean and std, as torchvision's weights expect.

    Raises:
        DataError: the folders do not have this layout; the message lists what is there.
    """
    args = read_args(data, ImageFolderArgs)
    steps = worker_steps(data.augment)
    if data.root is None:
        raise ConfigError(
            [Problem("data.root", "image_folder needs it", hint="--data.root FOLDER with train/ and val/")]
        )
    missing = [name for name in ("train", "val") if not (data.root / name).is_dir()]
    if missing:
        seen = ", ".join(sorted(entry.name for entry in data.root.iterdir())[:5]) or "nothing"
        raise DataError(f"{data.root} has no folder {' and no folder '.join(missing)}: it holds {seen}", _LAYOUT)
    found = {name: _list(data.root / name, data.on_corrupt == "skip") for name in ("train", "val")}
    classes = sorted(found["train"])
    if classes != sorted(found["val"]):
        only = {
            name: sorted(set(found[name]) - set(found[other])) for name, other in (("train", "val"), ("val", "train"))
        }
        said = "; ".join(f"only in {name}: {', '.join(names[:5])}" for name, names in only.items() if names)
        raise DataError(
            f"the classes of {data.root}/train and {data.root}/val differ: {said}", "give both the same folders"
        )
    train, evaluation = (_files(data.root / name, found[name], classes, args, steps) for name in ("train", "val"))
    names = tuple(escaped(name) for name in classes)
    return Splits(train, evaluation, len(classes), names, _MEAN, _STD, resize=args.resize)


_LAYOUT = "--data.root FOLDER, with images in FOLDER/train/<class>/ and FOLDER/val/<class>/"


def _files(
    folder: Path,
    found: dict[str, list[tuple[str, int]]],
    classes: Sequence[str],
    args: ImageFolderArgs,
    steps: Sequence[Any],
) -> ImageFiles:
    digest = hashlib.sha256()
    names: list[str] = []
    for name in classes:
        for file, size in found[name]:
            names.append(f"{name}/{file}")
            digest.update(os.fsencode(f"{name}/{file} {size}\n"))
    targets = np.repeat(np.arange(len(classes)), [len(found[name]) for name in classes])
    return ImageFiles(folder, names, targets, args, steps, digest.hexdigest()[:32])


def _list(split: Path, skip_dangling: bool) -> dict[str, list[tuple[str, int]]]:
    """Lists each class's image files under its folder, at any depth: path and size in bytes, sorted.

    Raises:
        DataError: no classes, a class without images, or files that are no images. Links that lead nowhere, unless
            they are named like images and are to be skipped; then they are listed, and their items are corrupt.
    """
    found: dict[str, list[tuple[str, int]]] = {}
    others: Counter[str] = Counter()
    dangling: list[str] = []
    for entry in sorted(split.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not os.path.exists(entry):
            dangling.append(str(entry))
        elif leads_back(entry, split):
            message = f"{entry} is a link to {os.path.realpath(entry)}, whose images are found without it"
            raise DataError(message, "remove the link")
        elif entry.is_dir():
            listing = list_images(entry, split)
            others.update(listing.others)
            found[entry.name] = listing.files
            dangling += [path for path in listing.dangling if not (skip_dangling and is_image_name(Path(path).name))]
    if dangling:
        raise DataError(
            f"{len(dangling)} links in {split} lead nowhere, such as {', '.join(dangling[:3])}",
            "fetch the files (dvc pull, git annex get), or leave out such images, counted: --data.on_corrupt skip",
        )
    if len(found) < 2:
        names = ", ".join(found) or "none"
        raise DataError(f"{split} must hold a folder for each of two or more classes; it holds {names}", _LAYOUT)
    empty = [name for name, files in found.items() if not files]
    beside = ", ".join(f"{count} of {extension}" for extension, count in others.most_common(5))
    if empty:
        raise DataError(
            f"{split} has {len(empty)} classes without an image, such as {empty[0]}"
            + (f"; other files: {beside}" if beside else ""),
            f"remove the folder, or fill it; images end in {', '.join(EXTENSIONS)}",
        )
    if others:
        raise DataError(
            f"{split} has files that are no images: {beside}", f"remove them; images end in {', '.join(EXTENSIONS)}"
        )
    return found
