"""Batches of a dataset's rows on the device: from arrays, from worker processes, or from a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dist_train.data.alike import require_alike
from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.dynamic import Dynamic
from dist_train.data.first_items import example_rows
from dist_train.data.items import Failure, name_of, rows_in
from dist_train.data.part import Part
from dist_train.data.shared_memory import PREFETCH
from dist_train.data.stack import CheckTargets, Collate, Stack
from dist_train.data.stream import read_stream
from dist_train.data.workers import EVALUATION, Keyed, Keys, received
from dist_train.distributed.watchdog.stop_signals import ignore_in_worker
from dist_train.errors import DataError
from dist_train.trees import Tree, leaves, map_leaves, take


class Source:
    """Fetches rows of a dataset by id: indexes image arrays, asks worker processes for items of a map-style dataset.

    The workers start with the first batch and live as long as the source.

    Args:
        workers: worker processes for a map-style dataset; 0: none. An iterable dataset always has one.
        skip_corrupt: leave out items for which the dataset raises CorruptSampleError, instead of raising it here.
        size: rows of an iterable dataset, which has no length.
        check_targets: raises DataError for targets [N, ...] that do not suit the task. Image arrays are checked before.
        collate: makes batches of items as the dataset gives them; None: tensors of one shape are stacked.
        dynamic: dimensions of inputs that vary from batch to batch.
        example: returns inputs of that many rows, as `Splits.example`; None: those of this dataset.
    """

    def __init__(
        self,
        dataset: ImageArrays | Dataset[Any],
        augmentation: Augmentation,
        device: torch.device,
        channels_last: bool,
        workers: int,
        seed: int,
        *,
        skip_corrupt: bool = False,
        size: int | None = None,
        check_targets: CheckTargets | None = None,
        collate: Collate | None = None,
        dynamic: Dynamic | None = None,
        example: Callable[[int], Tree] | None = None,
    ) -> None:
        # A part's rows are read from the whole dataset, with their ids in it.
        self._part = dataset.rows if isinstance(dataset, Part) else None
        self._dataset = dataset.whole if isinstance(dataset, Part) else dataset
        self._size = size
        dataset = self._dataset
        self._collate = collate
        self._dynamic = dynamic
        self._example = example
        self._stack = Stack(name_of(dataset), check_targets, collate, seed)
        self._first: Batch | None = None  # one row, of which all others have shapes and dtype
        self._augmentation = augmentation
        self._device = device
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._workers = workers
        self._seed = seed
        self.skips_corrupt = skip_corrupt and not isinstance(dataset, (ImageArrays, IterableDataset))
        self._keys = Keys()
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Rows of the dataset; `size` for an iterable one."""
        if self._part is not None:
            return len(self._part)
        return rows_in(self._dataset) if self._size is None else self._size

    def batches(self, rows: Iterator[np.ndarray], epoch: int | None) -> Iterator[Batch]:
        """Yields a batch on the device for each array of ids, augmented for `epoch`; None: only normalized.

        Only one such iterator at a time may read a dataset by workers.

        Raises:
            DataError: an item is malformed, or cannot be decoded and is not to be skipped.
        """
        turns: deque[np.ndarray | None] = deque()  # worker processes fetch ahead of what is yielded
        rows = self._in_dataset(rows, turns)
        fetched: Iterator[Batch]
        if isinstance(self._dataset, ImageArrays):
            arrays = self._dataset
            fetched = (arrays.gather(ids if turns[-1] is None else ids - turns[-1]) for ids in rows)
        elif isinstance(self._dataset, IterableDataset):
            place = EVALUATION if epoch is None else epoch
            stream = read_stream(
                self._dataset, list(rows), self._seed, place, self._stack, raw=self._collate is not None
            )
            fetched = (self._checked(batch, failures) for batch, failures in stream)
        else:
            fetched = self._from_workers(self._dataset, rows, EVALUATION if epoch is None else epoch)
        for batch in fetched:
            yield self._on_device(batch, epoch, turns.popleft())

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the dataset's indices of rows; others than theirs if they are those of a part."""
        return rows if self._part is None else self._part[rows]

    def _in_dataset(self, rows: Iterator[np.ndarray], turns: deque[np.ndarray | None]) -> Iterator[np.ndarray]:
        """Yields the dataset's indices for each array of rows; adds to `turns` what is to be added to the ids' seeds.

        None there means 0 for all.

        A row may be asked for as row + turn * len(self): its item is augmented in another way at each turn. What is
        yielded has the turn in the same form, in units of the dataset's length.
        """
        if isinstance(self._dataset, IterableDataset):
            for given in rows:
                turns.append(None)
                yield given
            return
        own, whole = len(self), rows_in(self._dataset)
        for given in rows:
            if self._part is None and given.max(initial=0) < own:  # of nearly all runs: a division takes longer
                turns.append(None)
                yield given
                continue
            turn, row = np.divmod(given, own)
            turns.append(turn * whole)
            yield self.ids_of(row) + turns[-1]

    def _from_workers(self, dataset: Dataset[Any], rows: Iterator[np.ndarray], epoch: int) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = DataLoader(
                Keyed(dataset, self._seed, self._memory_format is torch.channels_last, self._collate is not None),
                batch_sampler=self._keys,
                worker_init_fn=ignore_in_worker,
                num_workers=self._workers,
                collate_fn=self._stack,
                # Without a generator of its own, a DataLoader draws its base seed from the global one.
                generator=torch.Generator().manual_seed(self._seed),
                persistent_workers=self._workers > 0,
                prefetch_factor=PREFETCH if self._workers else None,
            )
        self._keys.set(epoch, rows)
        loader = self._loader
        for batch, failures in received(lambda: iter(loader)):
            yield self._checked(batch, failures)

    def _checked(self, batch: Batch, failures: list[Failure]) -> Batch:
        for failure in failures:
            if not (self.skips_corrupt and failure.corrupt):
                failure.throw()
        if len(batch.ids):
            if self._first is None:
                one = slice(0, 1)
                # Copies, as a view would keep the whole batch.
                first = (map_leaves(torch.clone, take(tree, one)) for tree in (batch.inputs, batch.targets))
                self._first = Batch(batch.ids[:1], *first)
            name = name_of(self._dataset)
            require_alike(self._first, batch, name, name, self._dynamic, self._collate is not None)
        return batch

    def _on_device(self, batch: Batch, epoch: int | None, turns: np.ndarray | None) -> Batch:
        if not len(batch.ids):
            return batch
        ids, inputs, targets = (map_leaves(self._moved, tree) for tree in (batch.ids, batch.inputs, batch.targets))
        if epoch is not None and self._augmentation.changes_images:
            self._require_images(inputs)
        if turns is not None and turns.any():
            ids = ids + torch.from_numpy(np.delete(turns, list(batch.missing))).to(self._device)
        return Batch(batch.ids, map_leaves(lambda leaf: self._ready(leaf, ids, epoch), inputs), targets, batch.missing)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _ready(self, leaf: torch.Tensor, ids: torch.Tensor, epoch: int | None) -> torch.Tensor:
        """Augments and normalizes images; several images of an item are augmented alike."""
        if leaf.dtype == torch.uint8:
            leaf = self._augmentation.normalize(leaf) if epoch is None else self._augmentation(leaf, ids, epoch)
        return self._in_memory_format(leaf)

    def _require_images(self, inputs: Tree) -> None:
        dtypes = {leaf.dtype for leaf in leaves(inputs)}
        if torch.uint8 not in dtypes:
            raise DataError(
                f"data.augment works on uint8 images [C, H, W], and the dataset gives {', '.join(map(str, dtypes))}",
                "--data.augment '[]', and augment in __getitem__; or return uint8 images there",
            )

    def _in_memory_format(self, leaf: torch.Tensor) -> torch.Tensor:
        image = leaf.dim() == 4 and leaf.is_floating_point()
        return leaf.contiguous(memory_format=self._memory_format) if image else leaf

    def arranged(self, inputs: Tree) -> Tree:
        """Returns images [B, C, H, W] in the model's memory format, other leaves unchanged."""
        return map_leaves(self._in_memory_format, inputs)

    def copies(self, rows: int) -> Tree:
        """Returns inputs for a batch of which nothing could be decoded: [rows, ...] of the first items, on the device.

        Raises:
            DataError: none of the first items can be decoded.
        """
        if self._example is not None:
            inputs = self._example(rows)
        else:
            inputs = example_rows(self._dataset, rows, self._augmentation.normalize, self._collate)
        return self.arranged(map_leaves(self._moved, inputs))
