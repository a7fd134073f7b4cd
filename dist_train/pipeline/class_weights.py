"""Gives a task the classes of all training rows, where its settings ask for them."""

from __future__ import annotations

import numpy as np
import torch

from dist_train.data.arrays import ImageArrays
from dist_train.data.items import name_of
from dist_train.data.splits import Splits
from dist_train.errors import DataError
from dist_train.tasks import Classification, Task

_SETTING = "task.args.class_weights: balanced"


def learn_classes(task: Task, splits: Splits) -> None:
    """Lets a classification with `class_weights: balanced` count the classes; the same on all ranks, as data are.

    Raises:
        DataError: the training set does not tell its classes without reading its items, or one has no row.
    """
    if isinstance(task, Classification) and task.wants_classes:
        task.learn_classes(_classes(splits.train))


def _classes(train: object) -> torch.Tensor:
    """Returns the class of each training row, int64 [N]."""
    if isinstance(train, ImageArrays):
        return train.targets
    given = [getattr(train, name, None) for name in ("targets", "labels")]
    found = next((each for each in given if each is not None), None)
    if found is None:
        raise DataError(
            f"{_SETTING} needs the class of each row, and {name_of(train)} has no attribute `targets` or `labels`",
            "give the dataset `targets`, as torchvision's have; or the weights: --task.args.class_weights '[1, ...]'",
        )
    values = np.asarray(found)
    if values.dtype.kind not in "biu" or values.ndim != 1:
        raise DataError(
            f"{_SETTING} needs class indices [N], and the targets of {name_of(train)} are {values.dtype} "
            f"{list(values.shape)}",
            "give the weights: --task.args.class_weights '[1, ...]'",
        )
    return torch.from_numpy(values.astype(np.int64))
