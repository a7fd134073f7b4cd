"""Divides a training set into rows to train and rows to evaluate on, by a share or into folds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.data import SplitConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.columns import classes_of, column
from dist_train.data.items import name_of, rows_in
from dist_train.data.part import part_of
from dist_train.data.permutation import Int64Array, Permutation, derive_key
from dist_train.data.splits import Splits
from dist_train.errors import DataError


def divided(splits: Splits, config: SplitConfig) -> Splits:
    """Returns splits whose two parts are rows of `splits.train`; they keep its ids, and `whole` is their number.

    Raises:
        DataError: the training set is a stream, does not tell classes or groups, or a part would be empty.
    """
    train = splits.train
    if isinstance(train, IterableDataset):
        raise DataError(
            f"data.split divides rows, and {name_of(train)} is a stream, which has none",
            "--data.split null, and give an evaluation set as Splits.eval; or a map-style dataset",
        )
    rows = rows_in(train)
    if config.folds is not None and config.folds > rows:
        raise DataError(
            f"data.split.folds is {config.folds}, and {name_of(train)} has {rows} rows: some folds would be empty",
            f"--data.split.folds {max(2, min(rows, 5))}",
        )
    held_out = held_out_rows(rows, config, _labels(train, config))
    if not 0 < held_out.sum() < rows:
        part = "evaluate" if not held_out.any() else "train"
        raise DataError(
            f"data.split leaves none of the {rows:,} rows of {name_of(train)} to {part} on",
            "another data.split.eval or data.split.folds",
        )
    parts = (_part(train, np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
    return replace(splits, train=next(parts), eval=next(parts), whole=rows)


def held_out_rows(rows: int, config: SplitConfig, labels: np.ndarray | None) -> np.ndarray:
    """Tells which rows are evaluated on: bool [rows], a function of its arguments alone.

    Args:
        labels: class or group of each row; None where `by` is row.
    """
    order = Permutation(rows, derive_key("split", config.seed))(np.arange(rows))
    if config.by == "group":
        assert labels is not None
        return _whole_groups(labels, order, config)
    if labels is not None:
        # The rows of a class are next to each other then, in a random order, so that every n-th row is a fair share.
        order = order[np.argsort(labels[order], kind="stable")]
    held_out = np.zeros(rows, bool)
    held_out[order[_turns(rows, config)]] = True
    return held_out


def _turns(rows: int, config: SplitConfig) -> np.ndarray:
    """Tells which places of an order are evaluated on: bool [rows]; evenly spaced, so that each run has its share.

    Over all folds each place is taken once.
    """
    places = np.arange(rows)
    if config.folds is not None:
        return places % config.folds == config.fold
    assert config.eval is not None
    steps = np.floor(np.arange(rows + 1) * config.eval + 0.5)
    return steps[1:] > steps[:-1]


def _whole_groups(groups: np.ndarray, order: Int64Array, config: SplitConfig) -> np.ndarray:
    """Holds out whole groups, in a random order: up to the share of rows, or as the fold with the fewest rows so far.

    Folds take the largest groups first, which keeps them of about one size.
    """
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    seen, first = np.unique(place[order], return_index=True)
    shuffled = seen[np.argsort(first)]
    held_out = np.zeros(len(sizes), bool)
    if config.folds is not None:
        filled = np.zeros(config.folds, np.int64)
        for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            fold = int(filled.argmin())
            filled[fold] += sizes[group]
            held_out[group] = fold == config.fold
        return held_out[place]
    assert config.eval is not None
    wanted, taken = round(len(groups) * config.eval), 0
    for group in shuffled:
        if taken + sizes[group] <= wanted:
            held_out[group] = True
            taken += sizes[group]
    if not taken:  # each group is larger than the share
        held_out[shuffled[sizes[shuffled].argmin()]] = True
    return held_out[place]


def _labels(train: ImageArrays | Dataset[Any], config: SplitConfig) -> np.ndarray | None:
    if config.by == "class":
        return classes_of(train, "data.split.by class", "--data.split.by row")
    if config.by == "row":
        return None
    groups = getattr(train, "groups", None) if isinstance(train, ImageArrays) else column(train, ("groups",))
    if groups is None:
        raise DataError(
            f"data.split.by group needs the group of each row, and {name_of(train)} has no attribute `groups`",
            "give the dataset `groups`, a number or a string for each row; or --data.split.by class, or row",
        )
    found = np.asarray(groups)
    missing = np.flatnonzero(np.isnan(found)) if found.dtype.kind == "f" else np.empty(0)
    if len(missing):
        raise DataError(
            f"the group of row {missing[0]} of {name_of(train)} is not a number, as are {len(missing)} in all: all of "
            "them would be one group",
            "give each row of `groups` a number or a string, a row that belongs to none one of its own",
        )
    return found


def _part(train: ImageArrays | Dataset[Any], rows: Int64Array) -> ImageArrays | Dataset[Any]:
    if not isinstance(train, ImageArrays):
        return part_of(train, rows)
    return ImageArrays(train.images[rows], train.targets[rows], train.ids[rows])
