"""Batches of a dataset's rows on the device: from arrays, from worker processes, or from a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.items import Failure, name_of, rows_in
from dist_train.data.shared_memory import PREFETCH
from dist_train.data.stack import CheckTargets, Stack
from dist_train.data.stream import read_stream
from dist_train.data.workers import EVALUATION, Keyed, Keys, received
from dist_train.distributed.watchdog.stop_signals import ignore_in_worker
from dist_train.errors import DataError


class Source:
    """Fetches rows of a dataset by id: indexes image arrays, asks worker processes for items of a map-style dataset.

    The workers start with the first batch and live as long as the source.

    Args:
        workers: worker processes for a map-style dataset; 0: none. An iterable dataset always has one.
        skip_corrupt: leave out items for which the dataset raises CorruptSampleError, instead of raising it here.
        size: rows of an iterable dataset, which has no length.
        check_targets: raises DataError for targets [N, ...] that do not suit the task. Image arrays are checked before.
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
    ) -> None:
        self._dataset = dataset
        self._stack = Stack(name_of(dataset), check_targets)
        self._first: tuple[int, torch.dtype] | None = None  # id and dtype of the first input
        self._augmentation = augmentation
        self._device = device
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._workers = workers
        self._seed = seed
        self._size = size
        self.skips_corrupt = skip_corrupt and not isinstance(dataset, (ImageArrays, IterableDataset))
        self._keys = Keys()
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Rows of the dataset; `size` for an iterable one."""
        return rows_in(self._dataset) if self._size is None else self._size

    def batches(self, rows: Iterator[np.ndarray], epoch: int | None) -> Iterator[Batch]:
        """Yields a batch on the device for each array of ids, augmented for `epoch`; None: only normalized.

        Only one such iterator at a time may read a dataset by workers.

        Raises:
            DataError: an item is malformed, or cannot be decoded and is not to be skipped.
        """
        fetched: Iterator[Batch]
        if isinstance(self._dataset, ImageArrays):
            fetched = (self._dataset.gather(ids) for ids in rows)
        elif isinstance(self._dataset, IterableDataset):
            place = EVALUATION if epoch is None else epoch
            stream = read_stream(self._dataset, list(rows), self._seed, place, self._stack)
            fetched = (self._checked(batch, failures) for batch, failures in stream)
        else:
            fetched = self._from_workers(self._dataset, rows, EVALUATION if epoch is None else epoch)
        for batch in fetched:
            yield self._on_device(batch, epoch)

    def _from_workers(self, dataset: Dataset[Any], rows: Iterator[np.ndarray], epoch: int) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = DataLoader(
                Keyed(dataset, self._seed),
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
            number, dtype = self._first = self._first or (int(batch.ids[0]), batch.inputs.dtype)
            if dtype != batch.inputs.dtype:
                raise DataError(
                    f"items {number} and {int(batch.ids[0])} of {name_of(self._dataset)} are not alike: "
                    f"their inputs are {dtype} and {batch.inputs.dtype}",
                    "give all items one dtype: uint8 images, which are normalized here, or finished floats",
                )
        return batch

    def _on_device(self, batch: Batch, epoch: int | None) -> Batch:
        ids, inputs, targets = (
            tensor.to(self._device, non_blocking=True) for tensor in (batch.ids, batch.inputs, batch.targets)
        )
        if not len(batch.ids):
            return batch
        if inputs.dtype != torch.uint8 and epoch is not None and self._augmentation.changes_images:
            raise DataError(
                f"data.augment works on uint8 images [C, H, W], and the dataset gives {inputs.dtype}",
                "--data.augment '[]', and augment in __getitem__; or return uint8 images there",
            )
        if inputs.dtype == torch.uint8:
            inputs = self._augmentation.normalize(inputs) if epoch is None else self._augmentation(inputs, ids, epoch)
        return Batch(batch.ids, self.arranged(inputs), targets, batch.missing)

    def arranged(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns images [B, C, H, W] in the model's memory format, other inputs unchanged."""
        return inputs.contiguous(memory_format=self._memory_format) if inputs.dim() == 4 else inputs

    def zeros(self, rows: int) -> torch.Tensor:
        """Inputs for a batch of which nothing could be decoded: float32 [rows, ...] on the device.

        Raises:
            DataError: the dataset has no `input_shape`.
        """
        shape = getattr(self._dataset, "input_shape", None)
        if shape is None:
            raise DataError(
                f"no item of a rank's batch can be decoded, and {type(self._dataset).__name__} has no `input_shape`",
                "--data.on_corrupt error names the first; or give the dataset that attribute, such as (3, 224, 224)",
            )
        return torch.zeros(rows, *shape, device=self._device)
