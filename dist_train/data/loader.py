"""Batches of one rank: gathered by index, augmented on the device, cut into micro-batches."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.augment import Augmentation
from dist_train.data.permutation import derive_key
from dist_train.data.sampler import ElasticDistributedSampler, evaluation_slice
from dist_train.errors import DataError


@dataclass(frozen=True)
class MicroBatch:
    """One forward. `inputs` [B, ...] on the device; the first `rows` of them are real, the rest run at weight 0. `targets` [rows]."""

    inputs: torch.Tensor
    targets: torch.Tensor
    rows: int


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of an optimizer step.

    Attributes:
        ids: the real samples, as they came out of the dataset with the tensors.
        micro_batches: at least one, each of at least two inputs.
        global_count: real samples of all ranks.
    """

    ids: list[int]
    micro_batches: list[MicroBatch]
    global_count: int

    @property
    def rows(self) -> int:
        return len(self.ids)


class Source:
    """Rows of a dataset by id: an index operation for image arrays, worker processes for map-style datasets."""

    def __init__(
        self,
        dataset: ImageArrays | Dataset[Any],
        augmentation: Augmentation,
        device: torch.device,
        channels_last: bool,
        workers: int,
        seed: int,
    ) -> None:
        self._dataset = dataset
        self._augmentation = augmentation
        self._device = device
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._workers = workers
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def batches(self, rows: Iterator[np.ndarray], epoch: int | None) -> Iterator[Batch]:
        """A batch on the device for each array of ids; augmented as in `epoch`, or only normalized where it is None."""
        fetched: Iterator[Batch]
        if isinstance(self._dataset, ImageArrays):
            fetched = (self._dataset.gather(ids) for ids in rows)
        else:
            keyed = _Keyed(self._dataset, self._seed, -1 if epoch is None else epoch)
            # A DataLoader takes a base seed from the global generator: give it one of its own.
            generator = torch.Generator().manual_seed(self._seed)
            fetched = iter(
                DataLoader(
                    keyed,
                    batch_sampler=_Lists(rows),
                    num_workers=self._workers,
                    collate_fn=_collate,
                    generator=generator,
                )
            )
        for batch in fetched:
            yield self._on_device(batch, epoch)

    def _on_device(self, batch: Batch, epoch: int | None) -> Batch:
        ids, inputs, targets = (
            tensor.to(self._device, non_blocking=True) for tensor in (batch.ids, batch.inputs, batch.targets)
        )
        if inputs.dtype != torch.uint8 and epoch is not None and self._augmentation.changes_images:
            raise DataError(
                f"data.augment works on uint8 images [C, H, W], and the dataset gives {inputs.dtype}",
                "--data.augment '[]', and augment in __getitem__; or return uint8 images there",
            )
        if inputs.dtype == torch.uint8:
            inputs = self._augmentation.normalize(inputs) if epoch is None else self._augmentation(inputs, ids, epoch)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=self._memory_format)
        return Batch(batch.ids, inputs, targets)


class TrainLoader:
    """This rank's share of each global batch."""

    def __init__(self, source: Source, sampler: ElasticDistributedSampler, micro_batch_size: int | None) -> None:
        self._source = source
        self._sampler = sampler
        self._micro_batch_size = micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler.num_steps

    def epoch(self, epoch: int, first_step: int, last_step: int) -> Iterator[StepBatch]:
        """The steps first_step .. last_step - 1 of an epoch."""
        self._sampler.set_epoch(epoch)
        planned: deque[tuple[int, int]] = deque()  # worker processes fetch ahead of what is yielded

        def rows() -> Iterator[np.ndarray]:
            for step in range(first_step, last_step):
                piece = self._sampler.rank_slice(step)
                planned.append((len(piece.ids), piece.global_count))
                yield np.concatenate([piece.ids, piece.filler])

        for batch in self._source.batches(rows(), epoch):
            real, global_count = planned.popleft()
            yield StepBatch(batch.ids[:real].tolist(), self._cut(batch, real), global_count)

    def _cut(self, batch: Batch, real: int) -> list[MicroBatch]:
        total = len(batch.inputs)
        pieces = max(1, -(-total // self._micro_batch_size)) if self._micro_batch_size else 1
        # As even as can be: with micro-batches of at least two rows none is left with one.
        pieces = min(pieces, max(1, total // 2))
        cut = []
        for piece in range(pieces):
            start, end = total * piece // pieces, total * (piece + 1) // pieces
            count = max(0, min(end, real) - start)
            cut.append(MicroBatch(batch.inputs[start:end], batch.targets[start : start + count], count))
        return cut


class EvaluationLoader:
    """This rank's contiguous, uneven part of a dataset: no sample twice, none left out."""

    def __init__(self, source: Source, batch_size: int, world_size: int, rank: int, limit: int | None = None) -> None:
        self._source = source
        self._batch_size = batch_size
        size = len(source) if limit is None else min(limit, len(source))
        self._range = evaluation_slice(size, world_size, rank)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(self._range.start, self._range.stop, self._batch_size)
        return self._source.batches(
            (np.arange(start, min(start + self._batch_size, self._range.stop)) for start in starts), None
        )


class _Lists:
    """Arrays of ids as the lists that a DataLoader's batch_sampler yields, one by one."""

    def __init__(self, rows: Iterator[np.ndarray]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return (ids.tolist() for ids in self._rows)


class _Keyed(Dataset[Any]):
    """A map-style dataset whose items depend on (seed, epoch, id) alone, whatever worker makes them; epoch -1 is evaluation."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._epoch = epoch

    def __getitem__(self, index: int) -> tuple[int, Any, Any]:
        seed_everything(derive_key("item", self._seed, self._epoch, index))
        item = self._dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(
                f"item {index} of {type(self._dataset).__name__} is not a pair (input, target)",
                "return (tensor, target) from __getitem__",
            )
        return index, item[0], item[1]


def _collate(items: list[tuple[int, Any, Any]]) -> Batch:
    ids, inputs, targets = torch.utils.data.default_collate(items)
    if not isinstance(inputs, torch.Tensor):
        raise DataError(
            f"inputs of a dataset must be tensors, not {type(inputs).__name__}",
            "convert them in __getitem__, for example by torchvision.transforms.v2.ToImage()",
        )
    return Batch(ids, inputs.float() if inputs.dtype == torch.float64 else inputs, targets)


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch (all devices), numpy and random; `seed` in 0 .. 2^64 - 1."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
