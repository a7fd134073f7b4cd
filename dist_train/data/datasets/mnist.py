"""MNIST and Fashion-MNIST: images in IDX files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import torch

from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.args import NoArgs, cache_folder, read_args
from dist_train.data.splits import Splits
from dist_train.errors import DataError

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

# Where Debian's package dataset-fashion-mnist puts the four files.
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist(data: DataConfig) -> Splits:
    """Fashion-MNIST: 60,000 images to train on and 10,000 to evaluate on, uint8 [N, 1, 28, 28], 10 classes.

    Read from data.root where it is set (the four IDX files, gzipped or not, or a folder that torchvision filled), else
    from Debian's package dataset-fashion-mnist, else downloaded by torchvision into the cache folder. Source: Xiao,
    Rasul, Vollgraf, 2017, https://arxiv.org/abs/1708.07747.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
    """
    from torchvision.datasets import FashionMNIST

    # Mean and std computed as those of the digits; a test computes them again.
    return _open(data, FashionMNIST, tuple(FashionMNIST.classes), 0.2860, 0.3530, _DEBIAN_FASHION_MNIST)


def mnist(data: DataConfig) -> Splits:
    """MNIST: 60,000 handwritten digits to train on and 10,000 to evaluate on, uint8 [N, 1, 28, 28], 10 classes.

    Read from data.root where it is set, as Fashion-MNIST is, else downloaded by torchvision into the cache folder. Source: LeCun,
    Bottou, Bengio, Haffner, 1998, http://yann.lecun.com/exdb/mnist/.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
    """
    from torchvision.datasets import MNIST

    # Mean and std as in PyTorch's example for MNIST, https://github.com/pytorch/examples/blob/main/mnist/main.py.
    return _open(data, MNIST, tuple("0123456789"), 0.1307, 0.3081, None)


def _open(
    data: DataConfig, reader: type[MNIST], classes: tuple[str, ...], mean: float, std: float, installed: Path | None
) -> Splits:
    """Reads the four files; `reader` is torchvision's class, which knows where they are downloaded from."""
    read_args(data, NoArgs)
    folder = _folder(data, reader, installed)
    return Splits(_read_split(folder, "train"), _read_split(folder, "t10k"), 10, classes, (mean,), (std,))


def _folder(data: DataConfig, reader: type[MNIST], installed: Path | None) -> Path:
    if data.root is not None:
        nested = data.root / reader.__name__ / "raw"
        return nested if nested.is_dir() else data.root
    if installed is not None and installed.is_dir():
        return installed
    root = cache_folder(data) / "downloads"
    try:
        return Path(reader(root, download=True).raw_folder)
    except (RuntimeError, URLError, OSError) as error:
        also = "" if installed is None else f", or apt-get install dataset-{installed.name}"
        hint = f"--data.root FOLDER with the four files{also}"
        raise DataError(f"cannot download {reader.__name__} to {root}: {error}", hint) from error


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
