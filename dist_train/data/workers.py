"""Worker processes: make items as functions of (seed, epoch, id); their ends are named."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset

from dist_train.data import shared_memory
from dist_train.data.items import LEAVE_OUT, Failure, Item, item_of, name_of, reading
from dist_train.data.permutation import derive_key
from dist_train.data.stack import too_many_files
from dist_train.distributed.watchdog.stop_signals import starting_workers
from dist_train.errors import DataError, DistTrainError, first_line

EVALUATION = -1  # in place of an epoch
T = TypeVar("T")


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


class Keyed(Dataset[Any]):
    """A map-style dataset whose items depend on (seed, epoch, id) alone, not on the worker."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Item | Failure:
        epoch, index = key
        try:
            with reading(f"item {index} of {name_of(self._dataset)}", LEAVE_OUT):
                given = self._item(epoch, index)
            return item_of(index, given, self._dataset)
        except DistTrainError as error:
            return Failure(error)

    def _item(self, epoch: int, index: int) -> Any:
        seed = derive_key("item", self._seed, epoch, index)
        if isinstance(self._dataset, Augmenting):
            return self._dataset[index] if epoch == EVALUATION else self._dataset.augmented(index, seed)
        seed_everything(seed)
        return self._dataset[index]


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch (all devices), numpy and random with a seed in 0 .. 2^64 - 1."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def received(start: Callable[[], Iterator[T]]) -> Iterator[T]:
    """Yields the batches of worker processes, which `start` starts.

    Raises:
        DataError: the processes cannot be started, or one of them ended.
    """
    try:
        with starting_workers():
            fetched = start()
    except OSError as error:
        raise DataError(
            f"worker processes cannot be started: {error}", "--data.workers 0, or a lower number"
        ) from error
    try:
        yield from fetched
    except (RuntimeError, OSError) as error:
        text = first_line(error)
        if "ancdata" in text or "Too many open files" in text:
            raise too_many_files(error) from error
        if not text.startswith("DataLoader worker"):
            raise
        raise _ended(text) from error


def _ended(text: str) -> DataError:
    message = f"a worker process that reads the data ended: {text}"
    if "Bus error" in text:
        return DataError(f"{message} ({shared_memory.described()})", shared_memory.HINT)
    return DataError(message, "if memory ran out, use fewer: --data.workers 1; 0 reads in the rank's own process")
