"""`image_folder`: image files train/<class>/* and val/<class>/*, decoded and cropped to uint8 by worker processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch.utils.data import Dataset

from dist_train.config.base import Count, Pixels
from dist_train.config.data import DataConfig, RandAugment, RandomHorizontalFlip, RandomResizedCrop
from dist_train.data.datasets.args import cache_folder, read_args
from dist_train.data.datasets.class_folders import folders, list_folders
from dist_train.data.image_file import MOST_PIXELS, read_file, read_image
from dist_train.data.image_listing import FoundFile
from dist_train.data.image_steps import ImageSteps
from dist_train.data.packs.index import FileTable, Kind
from dist_train.data.packs.read import Pack, open_pack, require_pack
from dist_train.data.splits import Splits
from dist_train.errors import ConfigError, Problem, escaped

# Mean and std of ImageNet-1k's training images on the scale 0..1; torchvision's weights were trained with them
# (https://docs.pytorch.org/vision/stable/models.html).
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolderArgs(BaseModel):
    """Arguments of `image_folder`.

    Attributes:
        size: pixels of an input's edge.
        resize: pixels of an evaluated image's shorter edge before the centre is cut out.
        max_pixels: most pixels of an image file; a larger one is refused by its header.
        pack: read decoded images, with a shorter edge of this many pixels, from one file that is made of them before
            training. auto: where such a file of `resize` pixels is there, as `dist-train pack` writes it. off: never.
        pack_format: how images are packed: raw, uint8 as they are; jpeg: compressed, and decoded for every item.
    """

    model_config = ConfigDict(extra="forbid")

    size: Pixels = 224
    resize: Pixels = 256
    max_pixels: Count = MOST_PIXELS
    pack: Literal["auto", "off"] | Annotated[int, Field(ge=1, le=65536)] = "auto"
    pack_format: Literal["raw", "jpeg"] = "raw"

    @field_validator("pack", mode="before")
    @classmethod
    def _off_of_yaml(cls, given: Any) -> Any:
        return "off" if given is False else given  # YAML 1.1 reads `off` so

    @model_validator(mode="after")
    def _centre_lies_inside(self) -> ImageFolderArgs:
        if self.resize < self.size:
            raise ValueError(f"resize, {self.resize}, must be at least size, {self.size}, which is cut out of it")
        if isinstance(self.pack, int) and self.pack < self.resize:
            raise ValueError(f"pack, {self.pack}, must be at least resize, {self.resize}, to which images are scaled")
        return self

    @property
    def kind(self) -> Kind:
        """The kind of pack that is read or written: of `resize` pixels, where `pack` is no size."""
        return Kind(self.pack if isinstance(self.pack, int) else self.resize, self.pack_format)


class ImageFiles(Dataset[Any]):
    """Image files with their classes; an item is (uint8 RGB [3, size, size], class index).

    Args:
        table: the files, in the order of their ids.
        targets: int64 [N].
        steps: the leading entries of data.augment that the workers apply.
        pack: the decoded images; None: the files are decoded for every item.

    Raises:
        CorruptSampleError: by an item, where the file holds no image that can be decoded; names the file.
        DataError: by an item, where the file cannot be read.
    """

    def __init__(
        self,
        table: FileTable,
        targets: np.ndarray,
        args: ImageFolderArgs,
        steps: Sequence[Any],
        fingerprint: str,
        pack: Pack | None = None,
    ) -> None:
        self.table = table
        self.targets = targets
        self.file_times = table.times
        self._args = args
        self._steps = ImageSteps(steps, args.size, args.resize)
        self.own_steps = len(steps)
        self.input_shape = (3, args.size, args.size)
        self.pack = pack
        self.fingerprint = fingerprint if pack is None else f"{fingerprint}+{pack.kind.code}"

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Returns the image's centre, after scaling its shorter edge to `resize` pixels, and its class."""
        out = torch.empty(self.input_shape, dtype=torch.uint8)
        return out, self.fill_input(index, None, out)

    def augmented(self, index: int, seed: int) -> tuple[torch.Tensor, int]:
        out = torch.empty(self.input_shape, dtype=torch.uint8)
        return out, self.fill_input(index, seed, out)

    def fill_input(self, index: int, seed: int | None, out: torch.Tensor) -> int:
        """Writes an item's input to `out`, augmented as a function of `seed` alone, and returns its class."""
        image = self.pack.image(index) if self.pack is not None else None
        if image is None:
            image = read_image(self.path(index), most_pixels=self._args.max_pixels)
        if seed is None:
            self._steps.centre(image, out)
        else:
            self._steps.augmented(image, seed, out)
        return int(self.targets[index])

    def path(self, index: int) -> Path:
        return self.table.path(index)

    def file_content(self, index: int) -> bytes:
        return read_file(self.path(index), self._args.max_pixels)


def worker_steps(augment: Sequence[Any]) -> list[Any]:
    """The leading entries of data.augment that workers apply; config/checks/data.py refuses such entries further on."""
    return list(
        takewhile(lambda step: isinstance(step, (RandomResizedCrop, RandomHorizontalFlip, RandAugment)), augment)
    )


def image_folder(data: DataConfig) -> Splits:
    """Images of data.root: train/<class>/* for training, val/<class>/* for evaluation; classes are sorted folder names.

    With `data.split`, val is not needed, and <class>/* of a root without train are the images.

    Images are scaled and cut as `ImageFolderArgs` says; for training, only if data.augment has no random_resized_crop.
    They are normalized with ImageNet's mean and std, as torchvision's weights expect.

    Raises:
        DataError: the folders do not have this layout, or data.args.pack is a size and their pack is not there.
    """
    args = read_args(data, ImageFolderArgs)
    steps = worker_steps(data.augment)
    if data.root is None:
        raise ConfigError(
            [Problem("data.root", "image_folder needs it", hint="--data.root FOLDER with train/ and val/")]
        )
    found = list_files(data)
    classes = sorted(found["train"])
    tables = {name: file_table(folder, found[name]) for name, folder in split_folders(data).items()}
    packs = _packs(data, args, tables)
    made = {
        name: ImageFiles(table, _targets(found[name]), args, steps, _fingerprint(table), packs[name])
        for name, table in tables.items()
    }
    names = tuple(escaped(name) for name in classes)
    return Splits(made["train"], made.get("val"), len(classes), names, _MEAN, _STD, resize=args.resize)


def list_files(data: DataConfig) -> dict[str, dict[str, list[FoundFile]]]:
    """Lists the files of each class in each split of data.root; see `list_folders`."""
    assert data.root is not None
    return list_folders(data.root, data.on_corrupt == "skip", data.split is not None)


def split_folders(data: DataConfig) -> dict[str, Path]:
    """Returns the folder of each split of data.root: train, and val unless `data.split` makes the evaluation set."""
    assert data.root is not None
    return folders(data.root, data.split is not None)


def file_table(folder: Path, found: dict[str, list[FoundFile]]) -> FileTable:
    """Returns the files of all classes, sorted by class."""
    names = [f"{name}/{file.path}" for name in sorted(found) for file in found[name]]
    sizes = [file.size for name in sorted(found) for file in found[name]]
    times = [file.changed for name in sorted(found) for file in found[name]]
    return FileTable.of(folder, names, sizes, times)


def _targets(found: dict[str, list[FoundFile]]) -> np.ndarray:
    return np.repeat(np.arange(len(found)), [len(found[name]) for name in sorted(found)])


def _fingerprint(table: FileTable) -> str:
    digest = hashlib.sha256()
    # Times are no part of it: a copy of the folder, on another node too, has other ones.
    for index, size in enumerate(table.sizes.tolist()):
        digest.update(os.fsencode(f"{table.name(index)} {size}\n"))
    return digest.hexdigest()[:32]


def _packs(data: DataConfig, args: ImageFolderArgs, tables: dict[str, FileTable]) -> dict[str, Pack | None]:
    """Returns the pack of each split; both have one, or none."""
    if args.pack == "off":
        return dict.fromkeys(tables)
    cache = cache_folder(data)
    if args.pack == "auto":
        found = {name: open_pack(cache, table, args.kind) for name, table in tables.items()}
        return found if all(found.values()) else dict.fromkeys(tables)
    return {name: require_pack(cache, table, args.kind) for name, table in tables.items()}
