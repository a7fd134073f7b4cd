"""Trees of tensors: structure, names, rows, and how a model takes them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from dist_train import trees

X, Y = torch.arange(6).reshape(3, 2), torch.arange(3.0)


@dataclass
class Out:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None


Pair = namedtuple("Pair", ["left", "right"])


def test_names_say_where_a_leaf_is() -> None:
    assert [name for name, _ in trees.named_leaves({"ids": X, "more": (Y, {"deep": X})}, "inputs")] == [
        "inputs.ids",
        "inputs.more.0",
        "inputs.more.1.deep",
    ]
    assert trees.named_leaves(X, "inputs")[0][0] == "inputs"


def test_rows_are_those_of_every_leaf() -> None:
    taken = trees.take({"ids": X, "more": [Y]}, slice(1, 3))
    assert trees.rows_of(taken) == 2 and torch.equal(taken["more"][0], Y[1:])
    assert torch.equal(trees.take((X, Y), [2, 0])[1], torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("inputs", [X, (X, Y), [X, Y], {"x": X, "y": Y}, {"y": Y, "x": X}])
def test_a_model_takes_a_dict_by_keywords_and_a_tuple_by_position(inputs: object) -> None:
    def model(x: torch.Tensor, y: torch.Tensor = Y) -> torch.Tensor:
        return x.sum() + 10 * y.sum()

    assert trees.call(model, inputs) == X.sum() + 10 * Y.sum()


def test_outputs_become_plain_trees() -> None:
    assert trees.plain(Out(X)).keys() == {"logits"}
    assert trees.plain(OrderedDict(out=X, aux=None)).keys() == {"out"}
    assert trees.plain(Pair(X, Y)).keys() == {"left", "right"}
    assert isinstance(trees.plain([X, None, Y]), tuple) and len(trees.plain([X, None, Y])) == 2


def test_images_are_floats_or_bytes_of_four_dimensions() -> None:
    images = torch.zeros(2, 3, 4, 4)
    assert trees.is_image(images) and trees.is_image(images.byte())
    assert not trees.is_image(images.long()) and not trees.is_image(images[0])
