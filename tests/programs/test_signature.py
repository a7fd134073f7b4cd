"""Signatures of models that take and return trees."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dist_train import trees
from dist_train.errors import ModelError
from dist_train.programs.program import Program, called, tree_call
from dist_train.programs.signature import (
    dynamic_of,
    leaves_of,
    output_names,
    plain_outputs,
    rows,
    rows_to_trace,
    runtime_names,
    tree_of,
)
from tests.support.tree_nets import AnsweringNet, seeded, texts

TREE = {"a": torch.zeros(3, 2), "b": (torch.ones(3, 4, dtype=torch.int64), {"c": torch.zeros(3)})}


def test_leaves_are_described_with_null_for_what_varies() -> None:
    described = [leaf.as_json() for leaf in leaves_of(TREE, {"b.0": {1: "sequence"}})]
    assert described == [
        {"name": "a", "shape": [None, 2], "dtype": "float32"},
        {"name": "b.0", "shape": [None, None], "dtype": "int64"},
        {"name": "b.1.c", "shape": [None], "dtype": "float32"},
    ]
    assert dynamic_of({"dynamic": {"b.0": {"1": "sequence"}}}) == {"b.0": {1: "sequence"}} and dynamic_of({}) == {}


def test_a_tree_is_made_again_of_the_names_and_leaves_in_any_order() -> None:
    named = trees.named_leaves(TREE)
    for pairs in (named, named[::-1]):
        made = tree_of([name for name, _ in pairs], [leaf for _, leaf in pairs])
        assert dict(trees.named_leaves(made)).keys() == dict(named).keys()
        assert isinstance(made["b"], tuple) and made["b"][1]["c"] is TREE["b"][1]["c"]  # type: ignore[index]
    assert tree_of([""], [1]) == 1 and tree_of(["0", "1"], [1, 2]) == (1, 2)


def test_rows_come_again_where_the_example_has_fewer_and_are_contiguous() -> None:
    five = rows({"x": torch.arange(6).reshape(3, 2).t().contiguous().t()}, 5)["x"]
    assert five.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]] and five.is_contiguous()
    assert trees.rows_of(rows_to_trace(texts(4, 7))) == 2
    assert trees.rows_of(rows_to_trace(texts(4, 2), {"input_ids": {1: "sequence"}})) == 3


def test_names_in_other_runtimes() -> None:
    assert runtime_names([""], "input") == ["input"]
    assert runtime_names(["ids", "pair.0"], "input") == ["ids", "pair_0"]
    assert runtime_names(["pair_0", "pair.0"], "input") == ["pair_0", "pair.0"]
    assert called("model", [""]) == "model(torch.from_numpy(images)).detach()"
    assert called("model", ["0", "1"]) == "model(torch.from_numpy(inputs['0']), torch.from_numpy(inputs['1'])).detach()"
    written = called("model", ["ids", "pair.0"], ["logits"])
    assert written == (
        "torch.set_grad_enabled(False); "
        "model(ids=torch.from_numpy(inputs['ids']), pair=(torch.from_numpy(inputs['pair.0']), ))"
    )
    assert "ids=" in Program("torchscript", _script()).usage_for(["ids"])


def _script() -> bytes:
    from dist_train.programs.torchscript import script_bytes, trace

    return script_bytes(
        trace(nn.Linear(2, 2).eval(), torch.zeros(2, 2)), torch.backends.quantized.supported_engines[-1]
    )


def test_outputs_of_a_class_become_a_dict_and_the_model_stays_as_it_was() -> None:
    net, inputs = seeded(AnsweringNet), texts(3)
    plain = plain_outputs(net, trees.call(net, inputs))
    assert type(net) is AnsweringNet and type(net(**inputs)).__name__ == "Answer"
    found = trees.call(plain, inputs)
    assert type(found) is dict and list(found) == ["logits", "hidden"]
    assert torch.equal(found["logits"], net(**inputs).logits)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert output_names(net, inputs) == ["logits", "hidden"]
    linear = nn.Linear(2, 2)
    assert plain_outputs(linear, linear(torch.zeros(1, 2))) is linear


Pair = namedtuple("Pair", ["x", "count"])


@dataclass
class Nested:
    """An output in an output."""

    pair: Pair
    rest: list[Tensor | None]


def test_nested_outputs_lose_what_is_none_and_numbers_are_refused() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Nested:
            return Nested(Pair(x, x + 1), [None, x + 2])

    inputs = torch.zeros(2, 1)
    found = plain_outputs(Net(), Net()(inputs))(inputs)
    assert dict(trees.named_leaves(found)).keys() == {"pair.x", "pair.count", "rest.0"}
    assert float(found["rest"][0][0]) == 2
    with pytest.raises(ModelError, match="outputs.count of the model is a int"):
        plain_outputs(nn.Identity(), Pair(inputs, 3))


def test_a_call_takes_a_tree_or_its_parts() -> None:
    call, inputs = tree_call(seeded(AnsweringNet)), texts(2)
    assert torch.equal(call(inputs)["logits"], call(**inputs)["logits"])
