"""Training rows are divided into one part to train and one to evaluate on: disjoint, complete, with their ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.data import SplitConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.division import divided, held_out_rows
from dist_train.data.part import Part, part_of
from dist_train.data.rows import Source
from dist_train.data.splits import Splits
from dist_train.errors import DataError


class Rows(Dataset[Any]):
    """Items whose input is their id."""

    def __init__(self, rows: int = 40, **columns: Any) -> None:
        self._rows = rows
        self.__dict__ |= columns

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), float(index)), index % 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def arrays(rows: int) -> ImageArrays:
    return ImageArrays(torch.arange(rows).to(torch.uint8).reshape(rows, 1, 1, 1), torch.arange(rows) % 4)


def splits(train: Any) -> Splits:
    numbers = {"mean": (0.5,), "std": (0.5,)} if isinstance(train, ImageArrays) else {}
    return Splits(train, None, num_classes=4, **numbers)


@pytest.mark.parametrize("rows", [40, 1237])
@pytest.mark.parametrize("by", ["row", "class"])
def test_folds_are_disjoint_and_complete(by: Any, rows: int) -> None:
    labels = np.arange(rows) % 7 if by == "class" else None
    folds = [held_out_rows(rows, SplitConfig(folds=5, fold=fold, by=by), labels) for fold in range(5)]
    assert (np.sum(folds, axis=0) == 1).all()
    assert max(fold.sum() for fold in folds) - min(fold.sum() for fold in folds) <= 1


def test_by_class_each_class_has_its_share_in_both_parts() -> None:
    labels = np.repeat([0, 1, 2], [500, 90, 10])
    for config in (SplitConfig(eval=0.1, by="class"), SplitConfig(folds=10, fold=3, by="class")):
        held_out = held_out_rows(600, config, labels)
        assert np.bincount(labels[held_out]).tolist() == [50, 9, 1]


def test_groups_stay_together() -> None:
    groups = np.random.default_rng(0).integers(0, 30, 500)
    folds = [held_out_rows(500, SplitConfig(folds=4, fold=fold, by="group"), groups) for fold in range(4)]
    assert (np.sum(folds, axis=0) == 1).all()
    for held_out in [*folds, held_out_rows(500, SplitConfig(eval=0.2, by="group"), groups)]:
        assert not set(groups[held_out]) & set(groups[~held_out])
        assert 60 <= held_out.sum() <= 150


def test_a_group_larger_than_the_share_is_held_out_alone() -> None:
    held_out = held_out_rows(9, SplitConfig(eval=0.1, by="group"), np.repeat(["a", "b"], [5, 4]))
    assert held_out.tolist() == [False] * 5 + [True] * 4


def test_the_seed_alone_draws_the_rows() -> None:
    first, again, other = (held_out_rows(200, SplitConfig(eval=0.3, seed=seed), None) for seed in (1, 1, 2))
    assert (first == again).all() and not (first == other).all()
    assert first.sum() == 60


def test_image_arrays_keep_their_ids() -> None:
    parts = divided(splits(arrays(40)), SplitConfig(eval=0.25, by="class"))
    assert isinstance(parts.train, ImageArrays) and isinstance(parts.eval, ImageArrays) and parts.whole == 40
    assert sorted([*parts.train.ids.tolist(), *parts.eval.ids.tolist()]) == list(range(40))
    assert parts.train.images.flatten().tolist() == parts.train.ids.tolist()
    assert parts.eval.targets.bincount().tolist() == [3, 2, 3, 2] or len(parts.eval) == 10


def source(dataset: Any) -> Source:
    return Source(dataset, Augmentation([], seed=0, mean=(), std=()), torch.device("cpu"), False, 0, 0)


def test_a_dataset_keeps_its_ids_and_its_items() -> None:
    parts = divided(splits(Rows(targets=[index % 4 for index in range(40)])), SplitConfig(folds=4, fold=1, by="class"))
    assert isinstance(parts.train, Part) and len(parts.train) == 30 and parts.train.fingerprint.startswith("rows-")
    (batch,) = source(parts.train).batches(iter([np.array([0, 5, 29])]), 0)
    assert batch.ids.tolist() == parts.train.rows[[0, 5, 29]].tolist() == batch.inputs[:, 0].tolist()
    assert parts.train[5][0][0] == parts.train.rows[5]


def test_a_part_of_a_part_has_the_ids_of_the_whole() -> None:
    inner = part_of(part_of(Rows(), np.arange(10, 40)), np.array([0, 3]))
    assert inner.rows.tolist() == [10, 13] and type(inner.whole) is Rows


def test_draws_of_one_row_are_augmented_in_different_ways() -> None:
    class Noisy(Rows):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.rand(3), index

    drawn = source(Noisy(10))
    (once,) = drawn.batches(iter([np.array([4, 14, 24, 4])]), 0)
    assert once.ids.tolist() == [4] * 4 == once.targets.tolist()
    assert once.inputs[0].equal(once.inputs[3]) and len(once.inputs.unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("train", "config", "said"),
    [
        (Rows(), {"eval": 0.1, "by": "class"}, "data.split.by class needs the class of each row, and Rows has no attr"),
        (Rows(), {"eval": 0.1, "by": "group"}, "needs the group of each row, and Rows has no attribute `groups`"),
        (Rows(), {"eval": 0.001}, "leaves none of the 40 rows of Rows to evaluate on"),
        (Rows(3), {"folds": 4}, "data.split.folds is 4, and Rows has 3 rows"),
        (Rows(groups=[float("nan")] * 40), {"eval": 0.1, "by": "group"}, "the group of row 0 of Rows is not a number"),
        (Rows(3), {"eval": 0.99}, "leaves none of the 3 rows of Rows to train on"),
        (Rows(targets=[1, 2]), {"eval": 0.1, "by": "class"}, "targets of Rows has 2 entries, and the dataset has 40"),
        (Rows(targets=[0.5] * 40), {"eval": 0.1, "by": "class"}, "needs class indices"),
    ],
)
def test_what_cannot_be_divided_is_refused(train: Any, config: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        divided(splits(train), SplitConfig(**config))


def test_a_stream_has_no_rows_to_divide() -> None:
    with pytest.raises(DataError, match="is a stream"):
        divided(Splits(Stream(), Rows(), num_classes=4, steps_per_epoch=3), SplitConfig(eval=0.1))
