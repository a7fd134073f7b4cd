"""The built-in datasets that need no files, and the arguments of all. Each takes the config's data section and returns its splits."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, PositiveInt

from dist_train.config_data import DataConfig
from dist_train.data.arguments import NoArgs, read_args
from dist_train.data.arrays import ImageArrays, Splits
from dist_train.data.fake_targets import fake_targets
from dist_train.data.image_folder import ImageFolderArgs
from dist_train.data.permutation import Permutation


class FakeArgs(NoArgs):
    """Arguments of `fake`: sizes of the splits, of an image, and the seed of everything."""

    kind: Literal["classification", "multilabel", "regression", "segmentation"] = "classification"
    """What the targets are: the task of the same name learns them. For regression, num_classes is how many numbers they are."""
    num_train: PositiveInt = 512
    num_eval: PositiveInt = 128
    num_classes: PositiveInt = 10
    channels: PositiveInt = 3
    height: PositiveInt = 32
    width: PositiveInt = 32
    seed: int = 0


ARGS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("digits", "mnist", "fashion_mnist", "cifar10", "cifar100"), NoArgs),
    "fake": FakeArgs,
    "image_folder": ImageFolderArgs,
}
"""What data.args of each built-in dataset may hold."""


def digits(data: DataConfig) -> Splits:
    """The UCI digits that scikit-learn ships: 1,437 to train on, 360 to evaluate on, uint8 [N, 1, 8, 8], 10 classes.

    The split is stratified and always the same. Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49.
    """
    from sklearn.datasets import load_digits

    read_args(data, NoArgs)
    bunch = load_digits()
    targets = torch.from_numpy(bunch.target).to(torch.int64)
    # 0..16 to 0..255: 255 / 16 is no integer, so values are rounded.
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    # Shuffled, then ordered by class: every fifth is stratified.
    order = Permutation(len(targets), key=0)(np.arange(len(targets)))
    by_class = order[np.argsort(bunch.target[order], kind="stable")]
    held_out = np.isin(np.arange(len(targets)), by_class[::5])
    train, evaluation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    return Splits(
        train=ImageArrays(images[train], targets[train]),
        eval=ImageArrays(images[evaluation], targets[evaluation]),
        num_classes=10,
        classes=tuple(str(digit) for digit in range(10)),
        # images.double().div(255).mean() and .std(unbiased=False) of the training split; a test computes them again.
        mean=(0.3052,),
        std=(0.3757,),
    )


def fake(data: DataConfig) -> Splits:
    """Synthetic images that a small network learns: each class is a smooth random pattern, seen through noise.

    With `kind`, targets of other tasks: see `fake_targets`.

    Deterministic in its arguments, see `FakeArgs`; classes take turns, so that each has its share of a split.
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


def check_args(data: DataConfig) -> None:
    """Checks data.args of a built-in dataset without loading it; raises ConfigError with each mistake."""
    if data.name in ARGS:
        read_args(data, ARGS[data.name])
