"""CIFAR-10 and CIFAR-100: the Python version by torchvision's readers, or the binary version of the files."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import numpy as np
import torch

from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.args import NoArgs, cache_folder, read_args
from dist_train.data.splits import Splits
from dist_train.errors import DataError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

_PIXELS = 3 * 32 * 32
_Parts = tuple[ImageArrays, ImageArrays, Sequence[str]]  # training images, evaluation images, names of the classes


def cifar10(data: DataConfig) -> Splits:
    """CIFAR-10: 50,000 training and 10,000 evaluation images, uint8 [N, 3, 32, 32], 10 classes.

    Reads data.root where it is set, else lets torchvision download the files into the cache folder. The root is, or
    holds, the folder cifar-10-batches-bin (binary version) or cifar-10-batches-py (Python version). The Python version
    consists of pickles, so only files with the published MD5 are read. Source: Krizhevsky, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html.

    Raises:
        DataError: a file is missing, damaged or not the published one, or the download failed.
    """
    from torchvision.datasets import CIFAR10

    # Mean and std over the pixels of the training images, as published widely; not computed here.
    return _open(data, CIFAR10, "cifar-10-batches-bin", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(data: DataConfig) -> Splits:
    """CIFAR-100: as CIFAR-10, with 100 (fine) classes; the folders are cifar-100-binary and cifar-100-python.

    Raises:
        DataError: a file is missing, damaged or not the published one, or the download failed.
    """
    from torchvision.datasets import CIFAR100

    return _open(data, CIFAR100, "cifar-100-binary", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def _open(
    data: DataConfig, dataset: type[CIFAR10], binary: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> Splits:
    read_args(data, NoArgs)
    if data.root is None:
        train, evaluation, classes = _download(cache_folder(data) / "downloads", dataset)
    else:
        train, evaluation, classes = _read(data.root, dataset, binary)
    return Splits(train, evaluation, len(classes), tuple(classes), mean, std)


def _download(root: Path, dataset: type[CIFAR10]) -> _Parts:
    try:
        return _arrays(dataset(root, download=True), dataset(root, train=False))
    except (RuntimeError, URLError, OSError, tarfile.TarError) as error:
        hint = f"--data.root FOLDER that holds {dataset.base_folder}, unpacked from {dataset.url}"
        raise DataError(f"cannot download {dataset.__name__} to {root}: {error}", hint) from error


def _read(root: Path, dataset: type[CIFAR10], binary: str) -> _Parts:
    test = dataset.test_list[0][0]
    for folder in (root / binary, root):
        if (folder / f"{test}.bin").exists():
            return _read_binary(folder, dataset)
    for folder in (root / dataset.base_folder, root):
        if (folder / test).exists():
            _require_published(folder, dataset)
            here = type(dataset.__name__, (dataset,), {"base_folder": "."})
            return _arrays(here(folder), here(folder, train=False))
    raise DataError(
        f"{root} holds neither {binary}/{test}.bin nor {dataset.base_folder}/{test}",
        "--data.root FOLDER with one of these folders, or leave data.root out to download them",
    )


def _require_published(folder: Path, dataset: type[CIFAR10]) -> None:
    """Raises DataError, naming the file, where one is missing or has another MD5 than the published file."""
    from torchvision.datasets.utils import calculate_md5

    meta = (dataset.meta["filename"], dataset.meta["md5"])
    for name, published in (*dataset.train_list, *dataset.test_list, meta):
        try:
            found = calculate_md5(folder / name)
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error.strerror}", "unpack the archive again") from error
        if found != published:
            raise DataError(
                f"{folder / name} is damaged, or not the published file: its MD5 is {found}, not {published}",
                f"unpack it again from {dataset.url}",
            )


def _arrays(train: CIFAR10, evaluation: CIFAR10) -> _Parts:
    arrays = [
        ImageArrays(torch.from_numpy(each.data).permute(0, 3, 1, 2), torch.tensor(each.targets))
        for each in (train, evaluation)
    ]
    return arrays[0], arrays[1], train.classes


def _read_binary(folder: Path, dataset: type[CIFAR10]) -> _Parts:
    """Reads rows of the labels' bytes, the last of which is the class, then 3072 bytes of red, green and blue."""
    names, labels = ("fine_label_names", 2) if dataset.meta["key"] == "fine_label_names" else ("batches.meta", 1)
    arrays = []
    for part in (dataset.train_list, dataset.test_list):
        paths = [folder / f"{name}.bin" for name, _ in part]
        rows = np.concatenate([_rows(path, labels + _PIXELS) for path in paths])
        images = torch.from_numpy(rows[:, labels:].copy()).view(-1, 3, 32, 32)
        arrays.append(ImageArrays(images, torch.from_numpy(rows[:, labels - 1].astype(np.int64))))
    return arrays[0], arrays[1], _content(folder / f"{names}.txt").decode("utf-8", "replace").split()


def _rows(path: Path, size: int) -> np.ndarray:
    content = np.frombuffer(_content(path), np.uint8)
    if not content.size or content.size % size:
        raise DataError(f"{path} has {content.size} bytes, not a multiple of {size}", "fetch the file again")
    return content.reshape(-1, size)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "unpack the archive again") from error
