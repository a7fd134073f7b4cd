"""Iterable datasets: a stream of items in its own order; each rank keeps its share of every global batch.

The guarantee: with a global batch size B, step k consumes items k * B .. k * B + B - 1 of an epoch's stream, at any
world size. A resumed run skips the items that were consumed. This holds if the stream yields the same items each time.
It may draw from the global generators of torch, numpy and random, which are seeded by (seed, epoch) in a process of its
own. It learns the epoch by a method `set_epoch(epoch)`, if it has one. Nothing else shuffles.

Every rank reads the whole stream and drops the other ranks' items, so items should be cheap. A ledger is refused,
because an item's index in a stream does not tell which sample it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from dist_train.data.arrays import Batch
from dist_train.data.items import LEAVE_OUT, Failure, Item, item_of, name_of, reading
from dist_train.data.permutation import derive_key
from dist_train.data.stack import Stack
from dist_train.data.workers import EVALUATION, received, seed_everything
from dist_train.distributed.watchdog.stop_signals import ignore_in_worker
from dist_train.errors import DataError, DistTrainError

PROMISE = (
    "the training data is a stream, in its own order, and every rank reads all of it. If it yields the same items each "
    "time, step k consumes the same items on any number of ranks, and a resumed run skips the consumed ones"
)


def read_stream(
    dataset: IterableDataset[Any], rows: list[np.ndarray], seed: int, epoch: int, stack: Stack, raw: bool = False
) -> Iterator[tuple[Batch, list[Failure]]]:
    """Yields a batch for each array of stream indices, read by a worker process.

    Args:
        rows: int64 [B] each; all indices of one array are larger than those of the array before.
        epoch: a training epoch, or EVALUATION.
        raw: items are left as the dataset gives them, for a `collate`.
    """
    # No batch size: the dataset makes the batches itself.
    batches = _Batches(dataset, rows, seed, epoch, stack, raw)
    loader = DataLoader(batches, batch_size=None, num_workers=1, worker_init_fn=ignore_in_worker)
    return received(lambda: iter(loader))


class _Batches(IterableDataset[Any]):
    def __init__(
        self, dataset: IterableDataset[Any], rows: list[np.ndarray], seed: int, epoch: int, stack: Stack, raw: bool
    ) -> None:
        self._dataset = dataset
        self._rows = rows
        self._seed = seed
        self._epoch = epoch
        self._stack = stack
        self._raw = raw

    def __iter__(self) -> Iterator[tuple[Batch, list[Failure]]]:
        try:
            yield from self._batches()
        except DistTrainError as error:
            yield self._stack([Failure(error)])

    def _batches(self) -> Iterator[tuple[Batch, list[Failure]]]:
        stream = self._items()
        for places in self._rows:
            wanted, last = set(places.tolist()), int(places.max())
            found: dict[int, Item] = {}
            for place, given in stream:
                if place in wanted:
                    found[place] = item_of(place, given, self._dataset, self._raw, self._epoch)
                if place == last:
                    break
            else:
                raise DataError(
                    f"the stream of {name_of(self._dataset)} ended before item {last}, which an epoch needs",
                    "lower Splits.steps_per_epoch, or let __iter__ begin again",
                )
            yield self._stack([found[place] for place in places.tolist()])

    def _items(self) -> Iterator[tuple[int, Any]]:
        name, end = name_of(self._dataset), object()
        seed_everything(derive_key("stream", self._seed, self._epoch))
        with reading(f"the stream of {name}"):
            if self._epoch != EVALUATION and hasattr(self._dataset, "set_epoch"):
                self._dataset.set_epoch(self._epoch)
            stream = iter(self._dataset)
        for place in count():
            with reading(f"item {place} of {name}", LEAVE_OUT):
                given = next(stream, end)
            if given is end:
                return
            yield place, given
