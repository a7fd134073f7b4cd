"""Claims of a dataset that its first items do not keep: a collate's order, and classes that are read without items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dist_train.config.data import SamplingConfig
from dist_train.config.tree import Config
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import DataError, ModelError
from dist_train.pipeline.check_fit import check_fit
from dist_train.pipeline.sampling import idle_weights
from dist_train.tasks import Classification, Task
from dist_train.tasks.regression import Regression

LENGTHS = [2, 5, 3, 5, 1, 4]


class Texts(Dataset[Any]):
    """Words of unlike lengths, with the class of each."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Any:
        return torch.arange(LENGTHS[index]) + 1 + 10 * index, index % 2


def padded(items: list[Any], order: list[int] | None = None, targets: list[int] | None = None) -> Any:
    order = list(range(len(items))) if order is None else order
    longest = max(len(each) for each, _ in items)
    ids = torch.zeros(len(items), longest, dtype=torch.int64)
    for row, place in enumerate(order):
        ids[row, : len(items[place][0])] = items[place][0]
    targets = list(range(len(items))) if targets is None else targets
    return {"ids": ids, "mask": ids > 0}, torch.tensor([items[place][1] for place in targets])


def longest_first(items: list[Any]) -> list[int]:
    return sorted(range(len(items)), key=lambda place: -len(items[place][0]))


def noisy(items: list[Any]) -> Any:
    inputs, targets = padded(items)
    drop = torch.rand(inputs["ids"].shape) < 0.3
    return {"ids": inputs["ids"].masked_fill(drop, 9), "mask": inputs["mask"]}, targets


def mixed(items: list[Any]) -> Any:
    """As mixup does, with other rows' targets beside the rows' own."""
    inputs, targets = padded(items)
    return inputs, targets[torch.randperm(len(items))]


def cut(items: list[Any]) -> Any:
    """To the shortest: masks of all rows are alike then, and like that of the shortest alone."""
    inputs, targets = padded(items)
    shortest = min(len(each) for each, _ in items)
    return {name: leaf[:, :shortest] for name, leaf in inputs.items()}, targets


def emptied(items: list[Any]) -> Any:
    """Takes the values out of its items, as some collates of transformers do."""
    return padded([(each[0].pop("ids"), each[1]) for each in items])


class Dicts(Texts):
    def __getitem__(self, index: int) -> Any:
        ids, label = super().__getitem__(index)
        return {"ids": ids}, label


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return (self.table(ids) * mask[..., None]).sum(1)


def check_texts(collate: Callable[[list[Any]], Any], texts: type[Texts] = Texts) -> None:
    dynamic = {name: {1: "length"} for name in ("ids", "mask")}
    splits = Splits(texts(), texts(), 2, collate=collate, dynamic=dynamic)
    check_fit(Config(), Mean(), splits, Classification(2, {}), World())


@pytest.mark.parametrize("collate", [padded, noisy, mixed, cut, lambda items: padded(items[:])])
def test_a_collate_that_keeps_the_order_passes(collate: Any) -> None:
    check_texts(collate)


def test_a_collate_may_change_its_items() -> None:
    check_texts(emptied, Dicts)


@pytest.mark.parametrize(
    ("collate", "said"),
    [
        (
            lambda items: padded(items, longest_first(items)),
            "inputs.ids is that of item 1, while targets keep the order",
        ),
        (lambda items: padded(items, None, longest_first(items)), "while inputs.ids, inputs.mask keep the order"),
        (lambda items: padded(items, *[longest_first(items)] * 2), "row 0 of inputs.ids is that of item 1"),
        (lambda items: padded(items[::-1]), "changes the order of rows: of items 0, 1, 2, 3, row"),
    ],
)
def test_a_collate_that_moves_rows_is_refused(collate: Any, said: str) -> None:
    with pytest.raises(DataError, match="collate of Texts changes the order of rows") as caught:
        check_texts(collate)
    assert said in caught.value.message and "enforce_sorted=False" in caught.value.hint


class Labelled(Dataset[Any]):
    """Items of the classes `real`, beside `targets`, which are said to be theirs."""

    def __init__(self, targets: Any, real: list[int]) -> None:
        self.targets, self._real = targets, real

    def __len__(self) -> int:
        return len(self._real)

    def __getitem__(self, index: int) -> Any:
        return torch.full((4,), float(index)), self._real[index]


REAL = [0, 1, 1, 0, 2, 2, 1, 0, 1, 2]
SETTINGS: dict[str, Any] = {
    "data.sampling.weights class_balanced": {"data": {"sampling": {"weights": "class_balanced"}}},
    "data.split.by class": {"data": {"split": {"eval": 0.2, "by": "class"}}},
    "task.args.class_weights balanced": {"task": {"args": {"class_weights": "balanced"}}},
}


def check_classes(targets: Any, setting: str) -> None:
    config = Config.model_validate(SETTINGS.get(setting, {}))
    splits = Splits(Labelled(targets, REAL), Labelled(REAL, REAL), 3)
    check_fit(config, nn.Linear(4, 3), splits, Classification(3, config.task.args), World())


@pytest.mark.parametrize("setting", SETTINGS)
def test_classes_that_are_not_those_of_the_items_are_refused(setting: str) -> None:
    check_classes(REAL, setting)
    check_classes(np.array(REAL), setting)
    with pytest.raises(DataError, match="not those of its items: row 0 2, item 0 0; row 3 2, item 3 0") as caught:
        check_classes([2 if each == 0 else each for each in REAL], setting)
    assert caught.value.message.startswith(setting)
    check_classes(list(reversed(REAL)), "")


def test_classes_may_have_other_numbers_where_only_their_sizes_count() -> None:
    """As before a target_transform that counts from 0."""
    from_1 = [each + 1 for each in REAL]
    check_classes(from_1, "data.sampling.weights class_balanced")
    check_classes(from_1, "data.split.by class")
    with pytest.raises(DataError, match="row 0 1, item 0 0"):
        check_classes(from_1, "task.args.class_weights balanced")


class Turned(nn.Linear):
    """Returns [outputs, B]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).T


@pytest.mark.parametrize("task", [Classification(2, {}), Regression(2, {})])
def test_rows_that_are_not_the_first_dimension_are_found_for_as_many_outputs_as_rows(task: Task) -> None:
    targets: Any = [0, 1] if isinstance(task, Classification) else [torch.zeros(2)] * 2
    rows = Labelled([], targets * 3)

    def check(model: nn.Module) -> None:
        check_fit(Config(), model, Splits(rows, rows, 2), task, World())

    check(nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"outputs have shape \[2, 2\] for 2 samples and \[2, 3\] for 3: rows are not"):
        check(Turned(4, 2))


def test_messages_on_inputs_that_are_no_images_do_not_call_them_so() -> None:
    rows = Labelled([], REAL)
    with pytest.raises(DataError) as caught:
        check_fit(Config(), nn.Linear(4, 5), Splits(rows, rows, 3), Classification(3, {}), World())
    assert "image" not in caught.value.message + caught.value.hint
    with pytest.raises(ModelError) as wide:
        check_fit(Config(), nn.Linear(4, 3).double(), Splits(rows, rows, 3), Classification(3, {}), World())
    assert "image" not in wide.value.message


def test_weights_that_only_order_the_rows_are_warned_of() -> None:
    weights = np.array([1.0, 2.0, 0.0, 4.0])

    def warned(**given: Any) -> list[str]:
        return [str(each) for each in idle_weights(SamplingConfig(weights="a", **given), weights)]

    (found,) = warned(replacement=False)
    assert "takes all 3 rows" in found and "--data.sampling.samples 1" in found
    assert warned(replacement=False, samples=3) and not warned(replacement=False, samples=2)
    assert not warned() and not list(idle_weights(None, None))
