"""`fake`: synthetic images that a small network can learn, with targets for any task, for tests and first tries."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_train.config.base import Count, Pixels
from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.args import NoArgs, read_args
from dist_train.data.splits import Splits

_IGNORED = 255  # target of a mask's border, which belongs to no class


class FakeArgs(NoArgs):
    """Arguments of `fake`: sizes of the splits and of an image, and the seed."""

    kind: Literal["classification", "multilabel", "regression", "segmentation"] = "classification"
    """Kind of targets, for the task of that name. For regression, num_classes is the number of values per sample."""
    num_train: Count = 512
    num_eval: Count = 128
    num_classes: Count = 10
    channels: Pixels = 3
    height: Pixels = 32
    width: Pixels = 32
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


def fake(data: DataConfig) -> Splits:
    """Synthetic images that a small network can learn: each class is a smooth random pattern with noise.

    With `kind`, targets for other tasks: see `fake_targets`. The images are a function of the arguments, see
    `FakeArgs`. Classes alternate, so each has an equal share of a split.
    """
    args = read_args(data, FakeArgs)
    if args.kind != "classification":
        return fake_targets(args)
    generator = np.random.Generator(np.random.Philox(args.seed))
    shape = (args.channels, args.height, args.width)
    coarse = generator.random((args.num_classes, args.channels, 4, 4), dtype=np.float32)
    patterns = F.interpolate(torch.from_numpy(coarse), shape[1:], mode="nearest").numpy()

    def split(size: int) -> ImageArrays:
        targets = np.arange(size) % args.num_classes
        images = 0.6 * patterns[targets] + 0.4 * generator.random((size, *shape), dtype=np.float32)
        return ImageArrays(torch.from_numpy((images * 255).astype(np.uint8)), torch.from_numpy(targets))

    train, evaluation = split(args.num_train), split(args.num_eval)
    # Noise and patterns are uniform: mean 1/2, variance (0.6**2 + 0.4**2) / 12.
    mean, std = (0.5,) * args.channels, (0.208,) * args.channels
    classes = tuple(f"class {index}" for index in range(args.num_classes))
    return Splits(train, evaluation, args.num_classes, classes, mean, std)


def fake_targets(args: FakeArgs) -> Splits:
    """Images that a small network can learn, uint8 [N, C, H, W], a function of `args`, with targets of `args.kind`.

    - multilabel: float32 [N, num_classes]; an image is the mean of the patterns of its labels, with noise.
    - regression: float32 [N, num_classes]; each number in -1..1 is the share of its pattern in the image.
    - segmentation: uint8 [N, H, W]; a rectangle of class 1 or higher on a background of class 0. The outermost pixels
      are 255, ignored.
    """
    generator = np.random.Generator(np.random.Philox(args.seed))
    coarse = generator.random((args.num_classes, args.channels, 4, 4), dtype=np.float32)
    patterns = F.interpolate(torch.from_numpy(coarse), (args.height, args.width), mode="nearest")
    make = {"multilabel": _multilabel, "regression": _regression, "segmentation": _segmentation}[args.kind]

    def split(size: int) -> ImageArrays:
        clean, targets = make(size, args, patterns, generator)
        noise = generator.random(tuple(clean.shape), dtype=np.float32)
        images = (clean.clamp(0, 1) * 0.8 + torch.from_numpy(noise) * 0.2) * 255
        return ImageArrays(images.to(torch.uint8), targets)

    train, evaluation = split(args.num_train), split(args.num_eval)
    mean, std = (0.5,) * args.channels, (0.2,) * args.channels
    if args.kind == "regression":
        return Splits(train, evaluation, mean=mean, std=std, num_outputs=args.num_classes)
    classes = tuple(f"class {index}" for index in range(args.num_classes))
    return Splits(train, evaluation, args.num_classes, classes, mean, std)


def _multilabel(size: int, args: FakeArgs, patterns: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.from_numpy(generator.random((size, args.num_classes)) < 0.4).float()
    shares = labels / labels.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("nk,kchw->nchw", shares, patterns), labels


def _regression(size: int, args: FakeArgs, patterns: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    numbers = torch.from_numpy(generator.random((size, args.num_classes), dtype=np.float32)) * 2 - 1
    mixed = torch.einsum("nk,kchw->nchw", numbers, patterns - 0.5) / args.num_classes
    return 0.5 + 0.8 * mixed, numbers


def _segmentation(size: int, args: FakeArgs, patterns: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    masks = torch.zeros(size, args.height, args.width, dtype=torch.uint8)
    colours = torch.linspace(0, 1, args.num_classes).view(-1, 1).repeat(1, args.channels)
    for row, mask in enumerate(masks):
        height, width = (int(generator.integers(side // 3, side // 2 + 1)) for side in mask.shape)
        top, left = (
            int(generator.integers(0, side - each + 1)) for side, each in zip(mask.shape, (height, width), strict=True)
        )
        mask[top : top + height, left : left + width] = 1 + row % max(args.num_classes - 1, 1)
    clean = colours[masks.long()].permute(0, 3, 1, 2)
    masks[:, 0] = masks[:, -1] = masks[:, :, 0] = masks[:, :, -1] = _IGNORED
    return clean, masks
