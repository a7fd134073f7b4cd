"""Outputs and targets that built-in tasks take: one tensor, also out of a tree."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dist_train.errors import DataError, ModelError
from dist_train.tasks import Classification
from dist_train.tasks.multilabel import Multilabel
from dist_train.tasks.regression import Regression
from dist_train.tasks.segmentation import Segmentation
from dist_train.training.outputs import in_float, nothing_of

X, Y = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)


@dataclass
class Output:
    """As transformers' ModelOutput."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Any = None


Named = namedtuple("Named", ["logits", "aux"])
TASKS = [Classification(3, {}), Multilabel(3, {}), Regression(3, {}), Segmentation(3, {})]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "outputs",
    [
        X,
        {"logits": X, "aux": Y},
        {"out": X, "aux": Y},
        {"anything": X},
        (X,),
        [X],
        Output(logits=X, hidden_states=(Y, Y)),
        Named(X, Y),
        {"deep": {"er": X}},
    ],
)
def test_one_tensor_is_picked(task: Any, outputs: Any) -> None:
    assert task.pick(outputs) is X and task.pick(task.pick(outputs)) is X


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ((X, Y), "returns a tuple (0, 1), not a tensor"),
        ({"a": X, "b": Y}, "returns a dict (a, b), not a tensor"),
        ({}, "returns a dict, not a tensor"),
        (3, "returns a int (a value), not a tensor"),
    ],
)
def test_several_are_refused_by_name(outputs: Any, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        Classification(3, {}).pick(outputs)
    assert said in caught.value.message and "pick()" in caught.value.hint


def test_a_tree_of_targets_is_refused_by_name() -> None:
    for task in TASKS:
        with pytest.raises(DataError, match="a tree of box, label"):
            task.check_targets({"box": X, "label": Y})


def test_outputs_are_cut_to_their_rows_in_float32() -> None:
    given = Output(loss=torch.tensor(1.0), logits=torch.zeros(4, 2, dtype=torch.bfloat16))
    found = in_float(given, 4, 3)
    assert found["logits"].shape == (3, 2) and found["logits"].dtype == torch.float32 and found["loss"].dim() == 0
    assert in_float({"kept": torch.ones(4, dtype=torch.int64)}, 4, 4)["kept"].dtype == torch.int64


def test_nothing_of_outputs_has_zero_gradients_of_all() -> None:
    left, right = (torch.ones(2, requires_grad=True) for _ in range(2))
    nothing_of({"a": left * 2, "b": (right, torch.ones(2, dtype=torch.int64))}).backward()
    assert left.grad is not None and right.grad is not None
    assert not left.grad.any() and not right.grad.any()
    left.grad = None
    nothing_of({"a": left - torch.inf}).backward()
    assert left.grad is not None and torch.equal(left.grad, torch.zeros(2))
