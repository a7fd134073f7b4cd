"""CIFAR-10 and CIFAR-100: from the binary version of their files, or from the Python version that torchvision downloads."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
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
    from torchvision.datasets import CIFAR10

_PIXELS = 3 * 32 * 32
# All that the files' pickles refer to, under the names of old and new numpy. Nothing of it runs code of the file's choice.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def cifar10(data: DataConfig) -> Splits:
    """CIFAR-10: 50,000 images to train on and 10,000 to evaluate on, uint8 [N, 3, 32, 32], 10 classes.

    Read from data.root where it is set, else downloaded by torchvision into the cache folder. The root is, or holds, the folder
    cifar-10-batches-bin (binary version) or cifar-10-batches-py (Python version, which torchvision fills). Source: Krizhevsky, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
    """
    from torchvision.datasets import CIFAR10

    read_args(data, NoArgs)
    train = [f"data_batch_{number}" for number in range(1, 6)]
    names = (train, ["test_batch"], "batches.meta", "label_names")
    # Mean and std over the pixels of the training images, as they are published widely; not computed here.
    return _open(data, CIFAR10, "cifar-10-batches-bin", names, 1, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(data: DataConfig) -> Splits:
    """CIFAR-100: as CIFAR-10, with 100 (fine) classes; the folders are cifar-100-binary and cifar-100-python.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
    """
    from torchvision.datasets import CIFAR100

    read_args(data, NoArgs)
    names = (["train"], ["test"], "meta", "fine_label_names")
    return _open(data, CIFAR100, "cifar-100-binary", names, 2, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


Names = tuple[list[str], list[str], str, str]


def _open(
    data: DataConfig,
    reader: type[CIFAR10],
    binary: str,
    names: Names,
    labels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Splits:
    """Reads both splits; `reader` is torchvision's class, `labels` the number of labels of an image in the binary version."""
    train, test, meta, key = names
    base = data.root if data.root is not None else _downloaded(data, reader)
    for folder in (base / binary, base):
        if (folder / f"{test[0]}.bin").exists():
            classes = _lines(folder / f"{meta if labels == 1 else key}.txt")
            splits = [_read_binary([folder / f"{name}.bin" for name in part], labels) for part in (train, test)]
            return Splits(splits[0], splits[1], len(classes), classes, mean, std)
    for folder in (base / reader.base_folder, base):
        if (folder / test[0]).exists():
            named = _unpickle(folder / meta).get(key)
            if not isinstance(named, list):
                raise DataError(f"{folder / meta} has no {key}", "fetch the file again")
            label = "labels" if labels == 1 else "fine_labels"
            splits = [_read_pickled([folder / name for name in part], label) for part in (train, test)]
            return Splits(splits[0], splits[1], len(named), tuple(map(str, named)), mean, std)
    raise DataError(
        f"{base} holds neither {binary}/{test[0]}.bin nor {reader.base_folder}/{test[0]}",
        "--data.root FOLDER with one of these folders, or leave data.root out to download them",
    )


def _downloaded(data: DataConfig, reader: type[CIFAR10]) -> Path:
    """The folder that holds the unpacked Python version. torchvision's own class would unpickle the files without restrictions."""
    from torchvision.datasets.utils import download_and_extract_archive

    root = cache_folder(data) / "downloads"
    if not (root / reader.base_folder / reader.meta["filename"]).exists():
        try:
            download_and_extract_archive(reader.url, str(root), filename=reader.filename, md5=reader.tgz_md5)
        except (RuntimeError, URLError, OSError, tarfile.TarError) as error:
            hint = f"--data.root FOLDER that holds {reader.base_folder}, unpacked from {reader.url}"
            raise DataError(f"cannot download {reader.__name__} to {root}: {error}", hint) from error
    return root


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "unpack the archive again") from error


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(_content(path).decode("utf-8", "replace").split())


def _read_binary(paths: list[Path], labels: int) -> ImageArrays:
    """Rows of `labels` bytes, the last of which is the class, then 3072 bytes of red, green and blue."""
    rows = []
    for path in paths:
        content = np.frombuffer(_content(path), np.uint8)
        if not content.size or content.size % (labels + _PIXELS):
            raise DataError(
                f"{path} has {content.size} bytes, not a multiple of {labels + _PIXELS}", "fetch the file again"
            )
        rows.append(content.reshape(-1, labels + _PIXELS))
    whole = np.concatenate(rows)
    return _arrays(whole[:, labels:], whole[:, labels - 1])


def _read_pickled(paths: list[Path], label: str) -> ImageArrays:
    images, targets = [], []
    for path in paths:
        content = _unpickle(path)
        pixels, classes = content.get("data"), content.get(label)
        if not (
            isinstance(pixels, np.ndarray)
            and pixels.dtype == np.uint8
            and pixels.ndim == 2
            and pixels.shape[1] == _PIXELS
            and isinstance(classes, list)
            and len(classes) == len(pixels)
            and all(isinstance(number, int) for number in classes)
        ):
            raise DataError(f"{path} has no `data` of 3072 bytes for each of its `{label}`", "fetch the file again")
        images.append(pixels)
        targets += classes
    return _arrays(np.concatenate(images), np.array(targets))


def _arrays(pixels: npt.NDArray[np.uint8], targets: npt.NDArray[Any]) -> ImageArrays:
    images = torch.from_numpy(np.ascontiguousarray(pixels)).view(-1, 3, 32, 32)
    return ImageArrays(images, torch.from_numpy(targets.astype(np.int64)))


class _Restricted(pickle.Unpickler):
    """Knows arrays and nothing else, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file does")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        # The files were written by Python 2, whose texts are bytes.
        content = _Restricted(io.BytesIO(_content(path)), encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
    ) as error:
        raise DataError(f"{path} is damaged, or no file of CIFAR's: {error}", "fetch the file again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no file of CIFAR's: it holds a {type(content).__name__}", "fetch the file again")
    return content
