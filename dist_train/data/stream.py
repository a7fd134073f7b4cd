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
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from dist_train.data.arrays import Batch
from dist_train.data.permutation import derive_key
from dist_train.data.workers import EVALUATION, Failure, seed_everything, stacked, triple
from dist_train.distributed.watchdog.stop_signals import ignore_in_worker, starting_workers
from dist_train.errors import DataError

PROMISE = (
    "the training data is a stream, in its own order, and every rank reads all of it. If it yields the same items each "
    "time, step k consumes the same items on any number of ranks, and a resumed run skips the consumed ones"
)


def read_stream(
    dataset: IterableDataset[Any], rows: list[np.ndarray], seed: int, epoch: int
) -> Iterator[tuple[Batch, list[Failure]]]:
    """Yields a batch for each array of stream indices, read by a worker process.

    Args:
        rows: int64 [B] each; all indices of one array are larger than those of the array before.
        epoch: a training epoch, or EVALUATION.
    """
    # No batch size: the dataset makes the batches itself.
    loader = DataLoader(
        _Batches(dataset, rows, seed, epoch), batch_size=None, num_workers=1, worker_init_fn=ignore_in_worker
    )
    with starting_workers():
        return iter(loader)


class _Batches(IterableDataset[Any]):
    def __init__(self, dataset: IterableDataset[Any], rows: list[np.ndarray], seed: int, epoch: int) -> None:
        self._dataset = dataset
        self._rows = rows
        self._seed = seed
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Batch, list[Failure]]]:
        seed_everything(derive_key("stream", self._seed, self._epoch))
        if self._epoch != EVALUATION and hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(self._epoch)
        stream = enumerate(self._dataset)
        for places in self._rows:
            wanted, last = set(places.tolist()), int(places.max())
            found: dict[int, Any] = {}
            for place, item in stream:
                if place in wanted:
                    found[place] = triple(place, item, self._dataset)
                if place == last:
                    break
            else:
                yield self._too_short(last)
                return
            yield stacked([found[place] for place in places.tolist()])

    def _too_short(self, last: int) -> tuple[Batch, list[Failure]]:
        error = DataError(
            f"the stream of {type(self._dataset).__name__} ended before item {last}, which an epoch needs",
            "lower Splits.steps_per_epoch, or let __iter__ begin again",
        )
        return stacked([Failure(error)])
