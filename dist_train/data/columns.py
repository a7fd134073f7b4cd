"""Columns of a dataset: a number for each row, such as its class, without reading the items."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from dist_train.data.arrays import ImageArrays
from dist_train.data.items import name_of, reading, rows_in
from dist_train.data.part import Part
from dist_train.data.permutation import Int64Array
from dist_train.errors import DataError

TARGETS = ("targets", "labels")  # as torchvision's datasets name them


def column(dataset: object, names: tuple[str, ...]) -> np.ndarray | None:
    """Returns the first attribute of these names, or what a method of one returns: an array [rows].

    A Subset, a ConcatDataset and a `Part` ask the datasets that they are made of, if they have none themselves. None
    where none is there.

    Raises:
        DataError: the dataset's own code fails, or it gives no numbers or strings, or not one a row.
    """
    if isinstance(dataset, ImageArrays):
        return dataset.targets.numpy() if "targets" in names else None
    name = next((each for each in names if getattr(dataset, each, None) is not None), None)
    if name is None:
        return _of_parts(dataset, names)
    what = f"{name} of {name_of(dataset)}"
    with reading(what):
        given = getattr(dataset, name)
        given = given() if callable(given) else given
        values = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if values.dtype.kind not in "biufUS" or values.ndim < 1:
        raise DataError(
            f"{what} is of {values.dtype}, not an array of one value a row", "give it as a list or an array"
        )
    if len(values) != rows_in(dataset):
        raise DataError(
            f"{what} has {len(values):,} entries, and the dataset has {rows_in(dataset):,} rows", "give one a row"
        )
    return values


def _of_parts(dataset: object, names: tuple[str, ...]) -> np.ndarray | None:
    if isinstance(dataset, (Part, Subset)):
        inner = column(dataset.whole if isinstance(dataset, Part) else dataset.dataset, names)
        rows = dataset.rows if isinstance(dataset, Part) else np.asarray(dataset.indices, np.int64)
        return None if inner is None else inner[rows]
    if isinstance(dataset, ConcatDataset):
        parts = [column(each, names) for each in dataset.datasets]
        known = [each for each in parts if each is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    if isinstance(dataset, TensorDataset) and "targets" in names and len(dataset.tensors) == 2:
        return dataset.tensors[1].detach().cpu().numpy()
    return None


def classes_of(dataset: object, what_for: str, otherwise: str) -> Int64Array:
    """Returns the class of each row: int64 [rows].

    Args:
        what_for: the setting that needs them, for messages.
        otherwise: another setting that does not.

    Raises:
        DataError: the dataset does not tell them, or its targets are no classes.
    """
    found = column(dataset, TARGETS)
    if found is None:
        raise DataError(
            f"{what_for} needs the class of each row, and {name_of(dataset)} has no attribute `targets` or `labels`",
            f"give the dataset `targets`, the class index of each row, as torchvision's have; or {otherwise}",
        )
    if found.dtype.kind not in "biu" or found.ndim != 1:
        raise DataError(
            f"{what_for} needs class indices [rows], and the targets of {name_of(dataset)} are {found.dtype} "
            f"{list(found.shape)}",
            otherwise,
        )
    return found.astype(np.int64)
