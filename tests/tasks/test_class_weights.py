"""Class weights and focal loss of classification, and the classes from which balanced weights follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from dist_train.data.arrays import ImageArrays
from dist_train.data.splits import Splits
from dist_train.errors import ConfigError, DataError
from dist_train.pipeline.class_weights import learn_classes
from dist_train.tasks import Classification

OUTPUTS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.3, 0.2, 0.1], [-1.0, 0.0, 1.0]])
TARGETS = torch.tensor([0, 0, 1, 2])


def loss(**args: Any) -> torch.Tensor:
    return Classification(3, args).loss(OUTPUTS, TARGETS)


def test_weights_are_factors_of_each_row() -> None:
    weights = torch.tensor([0.5, 2.0, 3.0])
    assert torch.allclose(loss(class_weights=weights.tolist()), loss() * weights[TARGETS])


def test_the_focal_loss_is_that_of_the_paper() -> None:
    known = F.softmax(OUTPUTS, 1)[torch.arange(4), TARGETS]
    assert torch.allclose(loss(focal_gamma=2.0), -((1 - known) ** 2) * known.log(), atol=1e-6)
    assert torch.equal(loss(focal_gamma=0.0), loss())


def test_the_focal_loss_of_a_certain_row_has_a_finite_gradient() -> None:
    outputs = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    Classification(3, {"focal_gamma": 0.5}).loss(outputs, torch.tensor([0])).sum().backward()
    assert outputs.grad is not None and torch.isfinite(outputs.grad).all()


def arrays(classes: list[int]) -> ImageArrays:
    return ImageArrays(torch.zeros(len(classes), 1, 2, 2, dtype=torch.uint8), torch.tensor(classes))


class Listed(Dataset[Any]):
    """A map-style dataset that may list its classes."""

    def __init__(self, targets: Any) -> None:
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 2, 2), 0


@pytest.mark.parametrize("train", [arrays([0, 0, 1, 2]), Listed([0, 0, 1, 2])], ids=["arrays", "dataset"])
def test_balanced_weights_have_mean_1_and_each_class_the_same_sum(train: Any) -> None:
    task = Classification(3, {"class_weights": "balanced"})
    learn_classes(task, Splits(train, arrays([0]), 3, mean=(0.5,), std=(0.5,)))
    factors = task.loss(OUTPUTS, TARGETS) / loss()
    assert torch.allclose(factors, torch.tensor([2 / 3, 2 / 3, 4 / 3, 4 / 3]))
    assert float(factors.mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (arrays([0, 0, 1]), "no training row is of class 2"),
        (Listed(None), "Listed has no attribute `targets`"),
        (Listed([[0.1], [0.2]]), "needs class indices"),
    ],
    ids=["missing", "untold", "numbers"],
)
def test_what_cannot_be_balanced_is_said(train: Any, message: str) -> None:
    task = Classification(3, {"class_weights": "balanced"})
    with pytest.raises(DataError, match=message):
        learn_classes(task, Splits(train, arrays([0]), 3, mean=(0.5,), std=(0.5,)))


def test_wrong_weights_are_refused() -> None:
    with pytest.raises(DataError, match="has 2 numbers, the data has 3 classes"):
        Classification(3, {"class_weights": [1, 2]}).check_outputs(torch.zeros(2, 3))
    with pytest.raises(ConfigError):
        Classification(3, {"class_weights": "balance"})
    with pytest.raises(ConfigError):
        Classification(3, {"class_weights": [1, -2, 1]})
