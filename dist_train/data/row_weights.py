"""Weights of the training rows, as `data.sampling` names them: by class, from a file, or from the dataset."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset

from dist_train.config.data import CLASS_BALANCED, SamplingConfig, is_weights_file
from dist_train.data.arrays import ImageArrays
from dist_train.data.columns import classes_of, column
from dist_train.data.draw import WeightedDraw
from dist_train.data.items import name_of, rows_in
from dist_train.data.part import Part
from dist_train.data.splits import Splits
from dist_train.errors import DataError

_KEY = "data.sampling.weights"


def row_weights(sampling: SamplingConfig, splits: Splits) -> np.ndarray:
    """Returns the weights of the rows of `splits.train`: float64 [rows].

    class_balanced: 1 / (rows of the row's class), so that each class is drawn as often as the others.

    Raises:
        DataError: the training set is a stream, or does not give them; or they cannot be drawn by.
    """
    train, chosen = splits.train, sampling.weights
    if isinstance(train, IterableDataset):
        raise DataError(
            f"data.sampling draws rows by weight, and {name_of(train)} is a stream, whose rows come in its own order",
            "--data.sampling null, or give a map-style dataset",
        )
    if chosen == CLASS_BALANCED:
        classes = classes_of(train, f"{_KEY} {CLASS_BALANCED}", f"--{_KEY} FILE, a weight for each row")
        values, source = 1 / _rows_of_own_class(classes), chosen
    elif is_weights_file(chosen):
        values, source = _of_whole(_read(Path(chosen)), splits, chosen), chosen
    else:
        found = None if isinstance(train, ImageArrays) else column(train, (chosen,))
        if found is None:
            raise DataError(
                f"{_KEY} {chosen}: {name_of(train)} has no attribute or method {chosen}",
                f"give the dataset one, or --{_KEY} FILE (a path has a dot or a slash), or {CLASS_BALANCED}",
            )
        values, source = found, f"{chosen} of {name_of(train)}"
    try:
        WeightedDraw(values, sampling.replacement, sampling.samples)
    except ValueError as error:
        raise DataError(f"data.sampling, weights {source}: {error}", "correct the weights, or data.sampling") from None
    return np.asarray(values, np.float64)


def _rows_of_own_class(classes: np.ndarray) -> np.ndarray:
    """Returns the number of rows that have each row's class."""
    if classes.min() >= 0 and classes.max() <= len(classes):
        found: np.ndarray = np.bincount(classes)[classes]
    else:  # any integers, at the cost of a sort
        _, place, counts = np.unique(classes, return_inverse=True, return_counts=True)
        found = counts[place]
    return found


def _read(path: Path) -> np.ndarray:
    """Reads one number a row: an array of NumPy, or lines of text.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # refused below
                values = np.loadtxt(path, delimiter=",", ndmin=1, dtype=np.float64)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{_KEY}: cannot read {path}: {reason}", "give one number a row: .npy, or .csv or .txt without a header"
        ) from error
    if not np.size(values):
        raise DataError(f"{_KEY}: {path} holds no numbers", "give one number a row: .npy, or .csv or .txt")
    return np.asarray(values)


def _of_whole(values: np.ndarray, splits: Splits, source: str) -> np.ndarray:
    """Returns the weights of the training rows, where a file has those of the dataset before `data.split`.

    Raises:
        DataError: there are more or fewer than rows.
    """
    train = splits.train
    rows = rows_in(train) if splits.whole is None else splits.whole
    if values.shape[:1] != (rows,):
        what = "the training set" if splits.whole is None else "the dataset, before data.split,"
        raise DataError(
            f"{_KEY}: {source} has {len(values):,} weights, and {what} has {rows:,} rows", "give one number a row"
        )
    if splits.whole is None:
        return values
    return values[train.rows if isinstance(train, Part) else train.ids.numpy()]  # type: ignore[union-attr]


def weights_digest(weights: np.ndarray | None) -> str:
    """Returns a SHA-256 of weights; "" for none."""
    return "" if weights is None else hashlib.sha256(np.ascontiguousarray(weights).tobytes()).hexdigest()
