"""A rank's batches: which rows, in which pieces, in which memory format, from whatever worker."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dist_train.config.data import AugmentConfig, RandomCrop, RandomHorizontalFlip
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import EvaluationLoader, Source, StepBatch, TrainLoader
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.errors import DataError

MEAN, STD = (0.5,), (0.25,)


def arrays(size: int, ids: torch.Tensor | None = None) -> ImageArrays:
    """Row n is filled with n, its target is n % 10."""
    images = torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return ImageArrays(images, torch.arange(size) % 10, ids)


class Noisy(Dataset[Any]):
    """Draws from every global generator, as datasets of other people do."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(1, 4, 4) + np.random.rand() + random.random()
        return noise + 10 * index, index % 10


def source(
    dataset: Any,
    seed: int = 3,
    workers: int = 0,
    channels_last: bool = False,
    augment: list[AugmentConfig] | None = None,
) -> Source:
    return Source(
        dataset,
        Augmentation(augment or [], seed=seed, mean=MEAN, std=STD),
        torch.device("cpu"),
        channels_last,
        workers,
        seed,
    )


def train_loader(
    dataset: Any, batch: int, world_size: int = 1, rank: int = 0, micro: int | None = None, **options: Any
) -> TrainLoader:
    sampler = ElasticDistributedSampler(dataset, world_size, rank, seed=3, global_batch_size=batch)
    return TrainLoader(source(dataset, **options), sampler, micro)


def steps(loader: TrainLoader, epoch: int = 0, first: int = 0) -> list[StepBatch]:
    return list(loader.epoch(epoch, first, loader.steps_per_epoch))


def values(batch: StepBatch) -> list[int]:
    """Identifies the rows behind a batch's real inputs, from the pixels of `arrays`."""
    real = torch.cat([micro.inputs[: micro.rows] for micro in batch.micro_batches])
    return torch.round((real[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).long().tolist()


@pytest.mark.parametrize(
    ("world_size", "size", "batch", "micro"),
    itertools.product([1, 2, 3, 5], [23, 25], [1, 2, 5, 12], [None, 1, 2, 3, 5]),
)
def test_shares_and_micro_batches_are_the_global_batch(
    world_size: int, size: int, batch: int, micro: int | None
) -> None:
    data = arrays(size)
    by_rank = [steps(train_loader(data, batch, world_size, rank, micro)) for rank in range(world_size)]
    alone = steps(train_loader(data, batch))
    consumed: Counter[int] = Counter()
    for step, shares in enumerate(zip(*by_rank, strict=True)):
        assert [number for share in shares for number in share.ids] == alone[step].ids
        for share in shares:
            consumed.update(share.ids)
            assert share.global_count == len(alone[step].ids) and share.rows == len(share.ids)
            assert values(share) == share.ids, "ids are those of the tensors"
            assert torch.cat([each.targets for each in share.micro_batches]).tolist() == [
                number % 10 for number in share.ids
            ]
            sizes = [len(each.inputs) for each in share.micro_batches]
            assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
            # Odd shares in pairs leave three at once, as one alone is nothing to BatchNorm.
            assert micro is None or max(sizes) <= max(micro, 3)
            assert all(len(each.targets) == each.rows for each in share.micro_batches)
            fillers = sum(sizes) - share.rows
            assert fillers == max(0, 2 - share.rows)
    assert consumed == Counter(range(size))


def test_a_rank_without_rows_has_two_inputs_that_are_rows_of_the_global_batch() -> None:
    data = arrays(3)
    share = steps(train_loader(data, 3, world_size=2, rank=1))[0]
    assert share.ids == [] and share.global_count == 3
    (micro,) = share.micro_batches
    assert len(micro.inputs) == 2 and micro.rows == 0 and len(micro.targets) == 0
    shown = torch.round((micro.inputs[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).long().tolist()
    assert set(shown) <= {0, 1, 2}


def test_ids_are_those_that_are_stored_with_the_rows() -> None:
    stored = torch.tensor([40, 41, 42, 43, 44, 45])
    batches = steps(train_loader(arrays(6, stored), 4))
    assert sorted(number for batch in batches for number in batch.ids) == stored.tolist()
    for batch in batches:
        assert values(batch) == [number - 40 for number in batch.ids]


def test_an_epoch_can_begin_at_any_step() -> None:
    loader = train_loader(arrays(23), 5)
    whole = steps(loader, epoch=2)
    for first in range(6):
        rest = steps(loader, epoch=2, first=first)
        assert [batch.ids for batch in rest] == [batch.ids for batch in whole[first:]]
    assert [batch.ids for batch in whole] != [batch.ids for batch in steps(loader, epoch=1)]


def test_augmented_rows_do_not_depend_on_world_size_or_micro_batches() -> None:
    augment: list[AugmentConfig] = [RandomCrop(padding=1), RandomHorizontalFlip()]
    images = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageArrays(images, torch.zeros(12, dtype=torch.int64))

    def rows(world_size: int, micro: int | None, epoch: int) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for rank in range(world_size):
            for batch in steps(train_loader(data, 7, world_size, rank, micro, augment=augment), epoch):
                real = torch.cat([each.inputs[: each.rows] for each in batch.micro_batches])
                found |= dict(zip(batch.ids, real, strict=True))
        return found

    alone = rows(1, None, 1)
    for world_size, micro in ((2, None), (3, 2), (1, 3)):
        other = rows(world_size, micro, 1)
        assert all(torch.equal(alone[number], other[number]) for number in range(12))
    assert not all(torch.equal(alone[number], rows(1, None, 2)[number]) for number in range(12)), (
        "another epoch is augmented in another way"
    )


def test_items_of_a_map_style_dataset_depend_on_seed_epoch_and_id_alone() -> None:
    data = Noisy(11)

    def rows(workers: int, epoch: int, batch: int, seed: int = 3, first: int = 0) -> dict[int, torch.Tensor]:
        torch.manual_seed(random.randrange(10**6))  # what the global generators were at before does not matter
        found: dict[int, torch.Tensor] = {}
        for each in steps(train_loader(data, batch, workers=workers, seed=seed), epoch, first):
            real = torch.cat([micro.inputs[: micro.rows] for micro in each.micro_batches])
            assert [int(row.min() // 10) for row in real] == each.ids, "ids are those of the tensors"
            found |= dict(zip(each.ids, real, strict=True))
        return found

    def equal(left: dict[int, torch.Tensor], right: dict[int, torch.Tensor]) -> bool:
        return all(torch.equal(left[number], right[number]) for number in left.keys() & right.keys())

    reference = rows(0, 1, 4)
    assert sorted(reference) == list(range(11))
    for other in (rows(2, 1, 4), rows(0, 1, 3), rows(2, 1, 3, first=2)):
        assert other and equal(reference, other)
    assert not equal(reference, rows(0, 2, 4)) and not equal(reference, rows(0, 1, 4, seed=4))


def test_workers_yield_the_steps_in_order_with_their_fillers() -> None:
    data = Noisy(17)
    for rank in range(3):
        plain, working = (steps(train_loader(data, 4, 3, rank, micro=2, workers=workers)) for workers in (0, 2))
        assert [(batch.ids, batch.global_count) for batch in plain] == [
            (batch.ids, batch.global_count) for batch in working
        ]
        for left, right in zip(plain, working, strict=True):
            assert [micro.rows for micro in left.micro_batches] == [micro.rows for micro in right.micro_batches]
            assert all(
                torch.equal(one.inputs, two.inputs)
                for one, two in zip(left.micro_batches, right.micro_batches, strict=True)
            )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["arrays", "map"])
def test_inputs_have_the_memory_format_of_the_model(kind: str, channels_last: bool) -> None:
    images = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8)
    data: Any = (
        ImageArrays(images, torch.zeros(6, dtype=torch.int64))
        if kind == "arrays"
        else [(image.float(), 0) for image in images]
    )
    augmentation = Augmentation([], seed=0, mean=(0.5,) * 3, std=(0.25,) * 3)
    made = Source(data, augmentation, torch.device("cpu"), channels_last, 0, 0)
    loader = TrainLoader(made, ElasticDistributedSampler(data, 1, 0, global_batch_size=6), None)
    for inputs in (steps(loader)[0].micro_batches[0].inputs, next(iter(EvaluationLoader(made, 6, 1, 0))).inputs):
        assert inputs.dtype == torch.float32
        assert inputs.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_uint8_images_of_a_map_style_dataset_are_normalized_and_floats_are_not() -> None:
    pixels = torch.full((1, 2, 2), 255, dtype=torch.uint8)
    for image, expected in ((pixels, (1 - MEAN[0]) / STD[0]), (torch.full((1, 2, 2), 7.0), 7.0)):
        batch = next(iter(EvaluationLoader(source([(image, 0), (image, 1)]), 2, 1, 0)))
        assert torch.allclose(batch.inputs, torch.tensor(expected)) and batch.targets.tolist() == [0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [None, 4, 100])
def test_evaluation_shows_each_row_once_in_order_and_unaugmented(world_size: int, limit: int | None) -> None:
    data, seen = arrays(10), []
    for rank in range(world_size):
        for batch in EvaluationLoader(source(data, augment=[RandomCrop(padding=2)]), 3, world_size, rank, limit):
            assert 1 <= len(batch.ids) <= 3
            shown = torch.round((batch.inputs[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).long().tolist()
            assert shown == batch.ids.tolist()
            seen += shown
    assert seen == list(range(min(10, limit or 10)))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (5, "item 0 of list is an int, not a pair"),
        (None, "item 0 of list is None, not a pair"),
        ((torch.zeros(1), 0, 1), "item 0 of list is a tuple of 3, not a pair"),
        (("text", 0), "the input of item 0 of list is a str, not a tensor"),
    ],
)
def test_items_that_are_not_what_they_should_be_are_named(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        next(iter(EvaluationLoader(source([item, item]), 2, 1, 0)))
    assert caught.value.hint


def test_an_error_in_a_worker_process_is_the_datasets_own() -> None:
    with pytest.raises(DataError, match="item 0 of list is an int, not a pair"):
        next(iter(EvaluationLoader(source([5, 5], workers=1), 2, 1, 0)))
