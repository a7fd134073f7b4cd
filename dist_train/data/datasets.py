"""The built-in datasets. Each takes the config's data section and returns its splits."""

import gzip
import os
import zlib
from pathlib import Path
from typing import Literal, TypeVar
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from dist_train.config_data import DataConfig
from dist_train.data.arrays import ImageArrays, Splits
from dist_train.data.fake_targets import fake_targets
from dist_train.data.permutation import Permutation
from dist_train.errors import ConfigError, DataError, Problem

# Where Debian's package dataset-fashion-mnist puts the four files.
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class _NoArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FakeArgs(_NoArgs):
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


ARGS: dict[str, type[BaseModel]] = {"digits": _NoArgs, "fashion_mnist": _NoArgs, "fake": FakeArgs}
"""What data.args of each built-in dataset may hold."""

Args = TypeVar("Args", bound=BaseModel)


def cache_folder(data: DataConfig) -> Path:
    """Node-local folder for downloads and memory-mapped arrays: data.cache_dir, or dist_train in the user's cache."""
    if data.cache_dir is not None:
        return data.cache_dir
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_train"


def digits(data: DataConfig) -> Splits:
    """The UCI digits that scikit-learn ships: 1,437 to train on, 360 to evaluate on, uint8 [N, 1, 8, 8], 10 classes.

    The split is stratified and always the same. Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49.
    """
    from sklearn.datasets import load_digits

    _args(data, _NoArgs)
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


def fashion_mnist(data: DataConfig) -> Splits:
    """Fashion-MNIST: 60,000 images to train on and 10,000 to evaluate on, uint8 [N, 1, 28, 28], 10 classes.

    Read from data.root where it is set (the four IDX files, gzipped or not, or a folder that torchvision filled), else
    from Debian's package dataset-fashion-mnist, else downloaded by torchvision into the cache folder. Source: Xiao,
    Rasul, Vollgraf, 2017, https://arxiv.org/abs/1708.07747.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
    """
    from torchvision.datasets import FashionMNIST

    _args(data, _NoArgs)
    folder = _fashion_mnist_folder(data)
    return Splits(
        train=_read_split(folder, "train"),
        eval=_read_split(folder, "t10k"),
        num_classes=10,
        classes=tuple(FashionMNIST.classes),
        # Computed as those of the digits; a test computes them again.
        mean=(0.2860,),
        std=(0.3530,),
    )


def fake(data: DataConfig) -> Splits:
    """Synthetic images that a small network learns: each class is a smooth random pattern, seen through noise.

    With `kind`, targets of other tasks: see `fake_targets`.

    Deterministic in its arguments, see `FakeArgs`; classes take turns, so that each has its share of a split.
    """
    args = _args(data, FakeArgs)
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
        _args(data, ARGS[data.name])


def _args(data: DataConfig, model: type[Args]) -> Args:
    """data.args, checked; raises ConfigError with each mistake."""
    try:
        return model.model_validate(data.args)
    except ValidationError as error:
        known = ", ".join(model.model_fields) or "none"
        problems = [
            Problem(
                ".".join(["data", "args", *map(str, mistake["loc"])]),
                mistake["msg"],
                hint=f"known arguments of {data.name}: {known}",
            )
            for mistake in error.errors()
        ]
        raise ConfigError(problems) from error


def _fashion_mnist_folder(data: DataConfig) -> Path:
    if data.root is not None:
        nested = data.root / "FashionMNIST" / "raw"
        return nested if nested.is_dir() else data.root
    if _DEBIAN_FASHION_MNIST.is_dir():
        return _DEBIAN_FASHION_MNIST
    from torchvision.datasets import FashionMNIST

    root = cache_folder(data) / "downloads"
    try:
        return Path(FashionMNIST(root, download=True).raw_folder)
    except (RuntimeError, URLError, OSError) as error:
        hint = "--data.root FOLDER with the four files, or apt-get install dataset-fashion-mnist"
        raise DataError(f"cannot download Fashion-MNIST to {root}: {error}", hint) from error


def _read_split(folder: Path, prefix: str) -> ImageArrays:
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
    targets = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(targets):
        raise DataError(f"{folder} has {len(images)} {prefix} images, but {len(targets)} labels")
    return ImageArrays(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(targets.astype(np.int64)))


def _read_idx(folder: Path, name: str, dimensions: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes, gzipped or not.

    The format: two zero bytes, type (8: unsigned byte), number of dimensions, then each dimension as a big-endian
    int32, then the values. http://yann.lecun.com/exdb/mnist/
    """
    zipped, plain = folder / f"{name}.gz", folder / name
    try:
        content = gzip.decompress(zipped.read_bytes()) if zipped.exists() else plain.read_bytes()
    except FileNotFoundError as error:
        hint = "--data.root FOLDER with the four files, or leave data.root out to download them"
        raise DataError(f"neither {zipped} nor {plain.name} exists", hint) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{zipped if zipped.exists() else plain} is damaged: {error}", "fetch the file again"
        ) from error
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{folder / name}: cut short after {len(content)} bytes", "fetch the file again")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">i4"))
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + int(np.prod(shape, dtype=np.int64)):
        message = f"{folder / name}: no IDX file of unsigned bytes with {dimensions} dimensions, or cut short"
        raise DataError(message, "fetch the file again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
