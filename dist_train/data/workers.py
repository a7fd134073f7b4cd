"""Runs in worker processes: makes items as functions of (seed, epoch, id) and stacks them to batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset

from dist_train.data.arrays import Batch
from dist_train.data.permutation import derive_key
from dist_train.errors import DataError

EVALUATION = -1  # in place of an epoch


@runtime_checkable
class Augmenting(Protocol):
    """A map-style dataset that augments its items itself; `__getitem__` gives them without augmentation."""

    own_steps: int
    """Number of leading steps of data.augment that it applies; the others work on batches on the device."""

    def augmented(self, index: int, seed: int) -> tuple[torch.Tensor, Any]:
        """Returns item `index`, augmented as a function of `seed` (0 .. 2^64 - 1) alone; the same in any process."""


class Keys:
    """A DataLoader's batch_sampler: yields lists of (epoch, id), so that workers outlive an epoch."""

    def __init__(self) -> None:
        self._lists: Iterator[list[tuple[int, int]]] = iter(())

    def set(self, epoch: int, rows: Iterator[np.ndarray]) -> None:
        self._lists = ([(epoch, index) for index in ids.tolist()] for ids in rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._lists


class Failure:
    """An item's DataError, sent from a worker as data: a DataLoader would turn it into a traceback."""

    def __init__(self, error: DataError) -> None:
        self.kind, self.message, self.hint = type(error), error.message, error.hint


class Keyed(Dataset[Any]):
    """A map-style dataset whose items depend on (seed, epoch, id) alone, not on the worker."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any, Any] | Failure:
        epoch, index = key
        try:
            item = self._item(epoch, index)
        except DataError as error:
            return Failure(error)
        return triple(index, item, self._dataset)

    def _item(self, epoch: int, index: int) -> Any:
        seed = derive_key("item", self._seed, epoch, index)
        if isinstance(self._dataset, Augmenting):
            return self._dataset[index] if epoch == EVALUATION else self._dataset.augmented(index, seed)
        seed_everything(seed)
        return self._dataset[index]


def triple(index: int, item: Any, dataset: Dataset[Any]) -> tuple[int, Any, Any] | Failure:
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return index, item[0], item[1]
    return Failure(
        DataError(
            f"item {index} of {type(dataset).__name__} is not a pair (input, target)",
            "return (tensor, target) from __getitem__",
        )
    )


def stacked(items: list[tuple[int, Any, Any] | Failure]) -> tuple[Batch, list[Failure]]:
    """Stacks the decoded items to a batch; returns the failures of the others."""
    failures = [item for item in items if isinstance(item, Failure)]
    missing = tuple(place for place, item in enumerate(items) if isinstance(item, Failure))
    found = [item for item in items if not isinstance(item, Failure)]
    if not found:
        nothing = torch.empty(0)
        return Batch(nothing.long(), nothing, nothing.long(), missing), failures
    ids, inputs, targets = torch.utils.data.default_collate(found)
    if not isinstance(inputs, torch.Tensor):
        error = DataError(
            f"inputs of a dataset must be tensors, not {type(inputs).__name__}",
            "convert them in __getitem__, for example by torchvision.transforms.v2.ToImage()",
        )
        return Batch(ids, torch.empty(0), torch.empty(0)), [Failure(error)]
    return Batch(ids, inputs.float() if inputs.dtype == torch.float64 else inputs, targets, missing), failures


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch (all devices), numpy and random with a seed in 0 .. 2^64 - 1."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
