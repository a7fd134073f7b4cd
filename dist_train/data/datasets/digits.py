"""`digits`: the UCI digits, which scikit-learn ships."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.args import NoArgs, read_args
from dist_train.data.permutation import Permutation
from dist_train.data.splits import Splits


def digits(data: DataConfig) -> Splits:
    """The UCI digits of scikit-learn: 1,437 training and 360 evaluation images, uint8 [N, 1, 8, 8], 10 classes.

    The split is stratified and always the same. Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49.
    """
    read_args(data, NoArgs)
    pixels, classes = _read()
    targets = torch.from_numpy(classes)
    # 0..16 to 0..255: 255 / 16 is no integer, so values are rounded.
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    # Shuffled, then ordered by class: every fifth is stratified.
    order = Permutation(len(targets), key=0)(np.arange(len(targets)))
    by_class = order[np.argsort(classes[order], kind="stable")]
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


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels, float64 [1797, 8, 8] from 0 to 16, and classes, int64 [1797]: those of sklearn's `load_digits`.

    Importing scikit-learn brings scipy and pandas, which takes as long as importing torch, to read a table of text.
    """
    sklearn = importlib.util.find_spec("sklearn")
    assert sklearn is not None  # the registry has asked
    file = Path((sklearn.submodule_search_locations or [""])[0], "datasets", "data", "digits.csv.gz")
    if not file.is_file():  # another version keeps it elsewhere
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.images, bunch.target.astype(np.int64)
    with gzip.open(file, "rt", encoding="utf-8") as table:
        rows = np.loadtxt(table, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)
