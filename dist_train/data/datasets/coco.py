"""`coco`: image files with boxes in COCO's format: a folder of images and a JSON file of annotations for each split."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.config.base import Count, Pixels
from dist_train.config.data import DataConfig
from dist_train.data.box_steps import BoxSteps, padded
from dist_train.data.datasets.args import read_args
from dist_train.data.datasets.coco_json import Annotations, read_annotations
from dist_train.data.image_file import MOST_PIXELS, read_image
from dist_train.data.splits import Splits
from dist_train.errors import ConfigError, CorruptSampleError, DataError, Problem, escaped

_Share = Annotated[float, Field(ge=0, le=1)]
_Three = tuple[_Share, _Share, _Share]


class CocoArgs(BaseModel):
    """Arguments of `coco`.

    Attributes:
        size: pixels of an input's edges; images are scaled to it without keeping their aspect ratio.
        train_json, eval_json: files of annotations, in data.root.
        train_images, eval_images: folders of the images that they name, in data.root.
        bad_annotations: error: end the run with the first ones; drop: leave them out, with a warning.
        mean, std: of each channel, on the scale 0..1. ImageNet's; torchvision's ssdlite320 has 0.5 for all.
        max_pixels: most pixels of an image file; a larger one is refused by its header.
    """

    model_config = ConfigDict(extra="forbid")

    size: Pixels = 320
    train_json: str = "annotations/train.json"
    eval_json: str = "annotations/val.json"
    train_images: str = "images"
    eval_images: str = "images"
    bad_annotations: Literal["error", "drop"] = "error"
    mean: _Three = (0.485, 0.456, 0.406)
    std: _Three = (0.229, 0.224, 0.225)
    max_pixels: Count = MOST_PIXELS


class CocoImages(Dataset[Any]):
    """Image files with their boxes; an item is (uint8 RGB [3, size, size], {boxes, mask}).

    Raises:
        CorruptSampleError: by an item, where the file holds no image that can be decoded, or one of another size than
            the annotations say; names the file.
        DataError: by an item, where the file cannot be read.
    """

    def __init__(self, folder: Path, found: Annotations, args: CocoArgs, steps: BoxSteps, most: int) -> None:
        self._folder, self._found, self._args, self._steps, self._most = folder, found, args, steps, most
        self.own_steps = steps.count
        self.input_shape = (3, args.size, args.size)
        self.fingerprint = hashlib.sha256(f"{found.sha256} {args.model_dump_json()}".encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._found.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, rows = self._steps.plain(*self._read(index))
        return image, padded(rows, self._most)

    def augmented(self, index: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns item `index`, mirrored and cropped as a function of `seed`."""
        image, rows = self._steps.augmented(*self._read(index), seed)
        return image, padded(rows, self._most)

    def path(self, index: int) -> Path:
        """Returns the file of an item."""
        return self._folder / self._found.names[index]

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.path(index)
        image = read_image(path, most_pixels=self._args.max_pixels)
        height, width = self._found.sizes[index].tolist()
        if tuple(image.shape[1:]) != (height, width):
            turned = tuple(image.shape[1:]) == (width, height)
            raise CorruptSampleError(
                f"{path} has {image.shape[2]} x {image.shape[1]} pixels, and {self._found.path} says {width} x "
                f"{height}, to which its boxes belong",
                (
                    "pictures are turned as their EXIF orientation says, and boxes must fit the turned one: "
                    if turned
                    else ""
                )
                + "correct width and height there, or the file; or leave such images out: --data.on_corrupt skip",
            )
        return image, torch.from_numpy(self._found.boxes(index))


def coco(data: DataConfig) -> Splits:
    """Images of data.root with boxes in COCO's format, for the task detection; see `CocoArgs` for the files.

    Classes are the categories in the order of their ids; crowds are left out. random_horizontal_flip and
    random_resized_crop, as the first entries of data.augment, move the boxes too. With data.split, the evaluation set
    is made of train_json, and eval_json is not read.

    Raises:
        DataError: a file is missing, is not of this format, or has annotations that are wrong; names file,
            annotation and mistake.
    """
    args = read_args(data, CocoArgs)
    if data.root is None:
        raise ConfigError([Problem("data.root", "coco needs it", hint="--data.root FOLDER with images/, annotations/")])
    steps = BoxSteps(data.augment, args.size)
    files = [(args.train_json, args.train_images)]
    if data.split is None:
        files.append((args.eval_json, args.eval_images))
    found = [(read_annotations(data.root / name), data.root / images) for name, images in files]
    train = found[0][0]
    for each, _ in found:
        _require_same(train, each)
        _judge(each, args.bad_annotations)
    for each, folder in found:
        _require_files(folder, each)
    if not train.most:
        raise DataError(
            f"{train.path} has no boxes to train on, but for crowds and wrong ones",
            "give a file with annotations; --data.args.train_json is its path in data.root",
        )
    most = max(each.most for each, _ in found)
    parts = [CocoImages(folder, each, args, steps, most) for each, folder in found]
    names = tuple(escaped(name) for _, name in train.categories)
    return Splits(parts[0], parts[1] if len(parts) > 1 else None, len(names), names, args.mean, args.std)


def _require_same(train: Annotations, other: Annotations) -> None:
    """Raises DataError where files have unlike categories."""
    pairs = zip([*train.categories, None], [*other.categories, None], strict=False)
    differ = next(((one, two) for one, two in pairs if one != two), None)
    if differ:
        raise DataError(
            f"the categories of {train.path} and {other.path} differ: {differ[0]} and {differ[1]}",
            "give both files the same categories, with the same ids",
        )


def _judge(found: Annotations, bad: str) -> None:
    """Raises or warns of annotations that are wrong."""
    if not found.mistakes:
        return
    listed = "; ".join(found.mistakes[:3]) + ("; ..." if len(found.mistakes) > 3 else "")
    count = len(found.mistakes)
    counted = f"{count:,} annotations of {found.path} are" if count > 1 else f"an annotation of {found.path} is"
    message = f"{counted} wrong: {listed}"
    if bad == "error":
        raise DataError(message, "correct them; or leave them out: --data.args.bad_annotations drop")
    warnings.warn(f"{message}; left out", stacklevel=2)


def _require_files(folder: Path, found: Annotations) -> None:
    """Raises DataError where image files are not there; lists each folder once."""
    parents: dict[str, list[str]] = {}
    for name in found.names:
        parents.setdefault(str(PurePosixPath(name).parent), []).append(PurePosixPath(name).name)
    missing: list[str] = []
    for parent, names in parents.items():
        try:
            there = set(os.listdir(folder / parent))
        except OSError:
            there = set()
        missing += [str(folder / parent / name) for name in names if name not in there]
    if missing:
        raise DataError(
            f"{len(missing):,} of the {len(found.names):,} images of {found.path} are not there, such as {missing[0]}",
            "--data.args.train_images and eval_images are their folders in data.root; file_name is the path in them",
        )
