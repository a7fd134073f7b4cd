"""`shapes`: coloured rectangles, circles and triangles on noise, with their boxes, for detectors; needs no download."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.config.base import Count, Pixels
from dist_train.config.data import DataConfig
from dist_train.data.box_steps import BoxSteps, padded
from dist_train.data.datasets.args import NoArgs, read_args
from dist_train.data.splits import Splits

CLASSES = ("rectangle", "circle", "triangle")
_TRIES = 10  # places drawn until one overlaps no other shape by much
_OVERLAP = 0.2  # of the smaller box's area, at most


class ShapesArgs(NoArgs):
    """Arguments of `shapes`: images of the splits, pixels of an edge, the most shapes of an image, and the seed."""

    num_train: Count = 512
    num_eval: Count = 128
    size: Annotated[Pixels, Field(ge=16)] = 64
    most: Annotated[int, Field(ge=1, le=20)] = 3
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Shapes(Dataset[Any]):
    """Images uint8 [3, size, size] with the boxes of their shapes; an item is a function of (args, split, index)."""

    def __init__(self, args: ShapesArgs, split: int, length: int, steps: BoxSteps) -> None:
        self._args, self._split, self._length, self._steps = args, split, length, steps
        self.own_steps = steps.count
        self.input_shape = (3, args.size, args.size)
        self.fingerprint = hashlib.sha256(f"shapes {args.model_dump_json()} {split}".encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, rows = self._steps.plain(*self._drawn(index))
        return image, padded(rows, self._args.most)

    def augmented(self, index: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns item `index`, mirrored and cropped as a function of `seed`."""
        image, rows = self._steps.augmented(*self._drawn(index), seed)
        return image, padded(rows, self._args.most)

    def _drawn(self, index: int) -> tuple[Tensor, Tensor]:
        """Draws an image and its boxes, float32 [N, 5]."""
        args = self._args
        generator = np.random.Generator(np.random.Philox(key=args.seed, counter=[0, 0, self._split, index]))
        image = generator.integers(0, 100, (args.size, args.size, 3), dtype=np.uint8)
        rows: list[list[float]] = []
        for number in range(int(generator.integers(1, args.most + 1))):
            box = self._place(generator, rows)
            if box is None:
                continue
            # Classes follow the index, so that each has an equal share.
            label = (index + number) % len(CLASSES)
            mask = _filled(CLASSES[label], box, args.size)
            image[mask] = generator.integers(120, 256, 3, dtype=np.uint8)
            rows.append([label, *box])
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.tensor(rows, dtype=torch.float32)

    def _place(self, generator: np.random.Generator, rows: list[list[float]]) -> tuple[int, int, int, int] | None:
        """Draws the box of a shape that hardly overlaps the others; None where there is no room for it."""
        size = self._args.size
        for _ in range(_TRIES):
            width, height = (int(side) for side in generator.integers(size // 5, size // 2 + 1, 2))
            left, top = (int(generator.integers(0, size - side + 1)) for side in (width, height))
            box = (left, top, left + width, top + height)
            if all(_shared(box, tuple(row[1:])) <= _OVERLAP for row in rows):
                return box
        return None


def _shared(box: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Returns the share of the smaller box that both cover."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    smaller = min((each[2] - each[0]) * (each[3] - each[1]) for each in (box, other))
    return max(width, 0) * max(height, 0) / smaller


def _filled(kind: str, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Returns the pixels of a shape that fills its box from edge to edge, bool [size, size]."""
    left, top, right, bottom = box
    y, x = np.mgrid[0:size, 0:size] + 0.5
    across, down = (x - left) / (right - left), (y - top) / (bottom - top)
    inside: np.ndarray = (across > 0) & (across < 1) & (down > 0) & (down < 1)
    if kind == "circle":
        return inside & ((across - 0.5) ** 2 + (down - 0.5) ** 2 < 0.25)
    return inside & (np.abs(across - 0.5) < down / 2) if kind == "triangle" else inside


def shapes(data: DataConfig) -> Splits:
    """Coloured rectangles, circles and triangles on noise, with their boxes, for the task detection.

    The images are a function of the arguments, see `ShapesArgs`. random_horizontal_flip and random_resized_crop, as the
    first entries of data.augment, move the boxes too.
    """
    args = read_args(data, ShapesArgs)
    steps = BoxSteps(data.augment, args.size)
    train, evaluation = (
        Shapes(args, split, length, steps) for split, length in enumerate((args.num_train, args.num_eval))
    )
    mean, std = (0.3,) * 3, (0.25,) * 3
    return Splits(train, evaluation, len(CLASSES), CLASSES, mean, std)
