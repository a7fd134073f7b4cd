"""Weights of the training rows by class, from a file and from the dataset; mistakes are named with what to give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from dist_train.config.data import SamplingConfig, SplitConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.division import divided
from dist_train.data.row_weights import row_weights
from dist_train.data.splits import Splits
from dist_train.errors import DataError

CLASSES = [0, 0, 0, 1, 2, 2]
BALANCED = [1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2]


class Rows(Dataset[Any]):
    def __init__(self, rows: int = 6, **columns: Any) -> None:
        self._rows = rows
        self.__dict__ |= columns

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3), 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def weights(train: Any, chosen: str, **options: Any) -> list[float]:
    numbers = {"mean": (0.5,), "std": (0.5,)} if isinstance(train, ImageArrays) else {}
    return row_weights(SamplingConfig(weights=chosen, **options), Splits(train, Rows(), 3, **numbers)).tolist()


@pytest.mark.parametrize(
    "train",
    [
        ImageArrays(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.tensor(CLASSES)),
        Rows(targets=CLASSES),
        Rows(labels=torch.tensor(CLASSES)),
        Subset(Rows(8, targets=[1, *CLASSES, 2]), range(1, 7)),
        ConcatDataset([Rows(2, targets=CLASSES[:2]), Rows(4, targets=np.array(CLASSES[2:]))]),
        TensorDataset(torch.zeros(6, 2), torch.tensor(CLASSES)),
    ],
    ids=lambda train: type(train).__name__,
)
def test_each_class_has_the_same_sum_of_weights(train: Any) -> None:
    assert weights(train, "class_balanced") == BALANCED


def test_a_column_is_an_attribute_or_a_method() -> None:
    assert weights(Rows(importance=[1, 2, 3, 4, 5, 6]), "importance") == [1, 2, 3, 4, 5, 6]
    assert weights(Rows(importance=lambda: torch.arange(6)), "importance") == [0, 1, 2, 3, 4, 5]


def test_a_file_has_a_number_for_each_row(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.arange(6, dtype=np.float32))
    (tmp_path / "w.txt").write_text("".join(f"{number}\n" for number in range(6)))
    for name in ("w.npy", "w.txt"):
        assert weights(Rows(), str(tmp_path / name)) == [0, 1, 2, 3, 4, 5]


def test_with_a_split_a_file_has_the_weights_of_all_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.arange(1, 7))
    arrays = ImageArrays(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.tensor(CLASSES))
    for train in (Rows(), arrays):
        numbers = {"mean": (0.5,), "std": (0.5,)} if train is arrays else {}
        parts = divided(Splits(train, None, 3, **numbers), SplitConfig(folds=3, fold=0))  # type: ignore[arg-type]
        found = row_weights(SamplingConfig(weights=str(tmp_path / "w.npy")), parts)
        rows = parts.train.ids.tolist() if isinstance(parts.train, ImageArrays) else parts.train.rows.tolist()  # type: ignore[union-attr]
        assert found.tolist() == [row + 1 for row in rows] and len(rows) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("1\n2\n", "has 2 weights, and the training set has 6 rows"),
        ("weight\n1\n", "could not convert string 'weight' to float64"),
        ("1,2\n" * 6, r"must be numbers \[rows\], one a row, not float64 \[6, 2\]"),
        ("1\n" * 5 + "-1\n", "the weight of row 5 is -1"),
        ("0\n" * 6, "the sum of the weights is 0"),
        ("", "w.csv holds no numbers"),
        ("\n# none\n", "w.csv holds no numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_file_of_other_numbers_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        weights(Rows(), str(tmp_path / "w.csv"))


@pytest.mark.parametrize(
    ("train", "chosen", "said"),
    [
        (Rows(), "class_balanced", "needs the class of each row, and Rows has no attribute `targets` or `labels`"),
        (Rows(), "importance", "Rows has no attribute or method importance"),
        (Rows(importance=[1]), "importance", "importance of Rows has 1 entries, and the dataset has 6 rows"),
        (Rows(importance=["a"] * 6), "importance", "must be numbers"),
        (Rows(targets=[[0, 1]] * 6), "class_balanced", r"needs class indices \[rows\], and the targets of Rows are"),
    ],
)
def test_a_dataset_that_does_not_give_them_is_told_what_to_give(train: Any, chosen: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        weights(train, chosen)


def test_too_many_samples_without_replacement_are_refused() -> None:
    with pytest.raises(DataError, match="9 rows cannot be drawn without replacement: 6 have a weight above 0"):
        weights(Rows(targets=CLASSES), "class_balanced", replacement=False, samples=9)


def test_a_stream_is_refused() -> None:
    with pytest.raises(DataError, match="is a stream, whose rows come in its own order"):
        row_weights(SamplingConfig(weights="a"), Splits(Stream(), Rows(), 3, steps_per_epoch=2))
