"""MNIST and Fashion-MNIST: torchvision's readers, also for a plain folder of the four files, gzipped or not."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

from torch import Tensor

from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.args import NoArgs, cache_folder, read_args
from dist_train.data.splits import Splits
from dist_train.errors import DataError, first_line

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

# Debian's package dataset-fashion-mnist puts the four gzipped files here.
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist(data: DataConfig) -> Splits:
    """Fashion-MNIST: 60,000 training and 10,000 evaluation images, uint8 [N, 1, 28, 28], 10 classes.

    Reads data.root where it is set: the four IDX files, gzipped or not, or a folder that torchvision filled. Otherwise
    reads the files of Debian's package dataset-fashion-mnist, or lets torchvision download them into the cache folder.
    Source: Xiao, Rasul, Vollgraf, 2017, https://arxiv.org/abs/1708.07747.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
    """
    from torchvision.datasets import FashionMNIST

    # Mean and std are computed from the training images; a test computes them again.
    return _open(data, FashionMNIST, tuple(FashionMNIST.classes), 0.2860, 0.3530, _DEBIAN_FASHION_MNIST)


def mnist(data: DataConfig) -> Splits:
    """MNIST: 60,000 training and 10,000 evaluation images of digits, uint8 [N, 1, 28, 28], 10 classes.

    Reads data.root as Fashion-MNIST does, or lets torchvision download the files into the cache folder. Source: LeCun,
    Bottou, Bengio, Haffner, 1998, http://yann.lecun.com/exdb/mnist/.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
    """
    from torchvision.datasets import MNIST

    # Mean and std as in PyTorch's example for MNIST, https://github.com/pytorch/examples/blob/main/mnist/main.py.
    return _open(data, MNIST, tuple("0123456789"), 0.1307, 0.3081, None)


def _open(
    data: DataConfig, dataset: type[MNIST], classes: tuple[str, ...], mean: float, std: float, installed: Path | None
) -> Splits:
    read_args(data, NoArgs)
    folder = _folder(data, dataset, installed)
    return Splits(_read_split(folder, "train"), _read_split(folder, "t10k"), 10, classes, (mean,), (std,))


def _folder(data: DataConfig, dataset: type[MNIST], installed: Path | None) -> Path:
    if data.root is not None:
        nested = data.root / dataset.__name__ / "raw"
        return nested if nested.is_dir() else data.root
    if installed is not None and installed.is_dir():
        return installed
    root = cache_folder(data) / "downloads"
    try:
        return Path(dataset(root, download=True).raw_folder)
    except (RuntimeError, URLError, OSError) as error:
        also = "" if installed is None else f", or apt-get install dataset-{installed.name}"
        hint = f"--data.root FOLDER with the four files{also}"
        raise DataError(f"cannot download {dataset.__name__} to {root}: {error}", hint) from error


def _read_split(folder: Path, prefix: str) -> ImageArrays:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    images = _read(folder, f"{prefix}-images-idx3-ubyte", read_image_file)
    targets = _read(folder, f"{prefix}-labels-idx1-ubyte", read_label_file)
    if len(images) != len(targets):
        raise DataError(f"{folder} has {len(images)} {prefix} images, but {len(targets)} labels")
    return ImageArrays(images.unsqueeze(1), targets)


def _read(folder: Path, name: str, reader: Callable[[str], Tensor]) -> Tensor:
    from torchvision.datasets.utils import extract_archive

    zipped, plain = folder / f"{name}.gz", folder / name
    path = zipped if zipped.exists() else plain
    if not path.exists():
        hint = "--data.root FOLDER with the four files, or leave data.root out to download them"
        raise DataError(f"neither {zipped} nor {plain.name} exists", hint)
    try:
        with tempfile.TemporaryDirectory() as unpacked:
            return reader(extract_archive(zipped, unpacked) if path == zipped else str(plain))
    # The reader asserts the header, and views the bytes in the shape that it states.
    except (OSError, EOFError, zlib.error, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged, or no such IDX file: {first_line(error)}", "fetch the file again"
        ) from error
