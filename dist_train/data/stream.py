"""Iterable datasets: one stream of items in its own order, of which each rank keeps its share of every global batch.

The promise: step k consumes items k * B .. k * B + B - 1 of an epoch's stream, B being the global batch size, at any world size; a
resumed run reads past what was consumed. It holds where the stream gives the same items each time that it is begun: it may draw
from the global generators of torch, numpy and random, which are seeded by (seed, epoch) in a process of its own, and may learn the
epoch by a method `set_epoch(epoch)`. Nobody else shuffles. Every rank reads the whole stream, and drops what is not its share: let
items be cheap. A ledger is refused, because an item's place in a stream does not say which sample it was.
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
    "the training data is a stream: step k consumes the same items on any number of ranks, and a resumed run reads past those that "
    "were consumed, if the stream gives the same items each time; its order is its own, and every rank reads all of it"
)


def read_stream(
    dataset: IterableDataset[Any], rows: list[np.ndarray], seed: int, epoch: int
) -> Iterator[tuple[Batch, list[Failure]]]:
    """A batch for each array of places in the stream, read by a worker process.

    Args:
        rows: int64 [B] each; all places in one lie behind all places in the one before.
        epoch: of training, or EVALUATION.
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
