"""Parameters without a gradient are found and named before the first step, by trials that change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_train.distributed.world import World
from dist_train.errors import ModelError
from dist_train.training.unused import find_unused

EXAMPLE = torch.zeros(2, 3)


class Net(nn.Module):
    """Uses `old` never, and `middle` with probability `p`."""

    def __init__(self, p: float = 1.0, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.old = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 5)
        self.norm, self.dropout, self.head = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)
        self._p, self._reentrant = p, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        if self._p == 1 or torch.rand(()) < self._p:
            x = checkpoint(self.middle, x, use_reentrant=True) if self._reentrant else x + self.middle(x)
        outputs: Tensor = self.head(self.dropout(x))
        return outputs


def test_a_layer_that_is_left_over_is_named_and_frozen_ones_are_no_fault() -> None:
    net = Net()
    found = find_unused(net, EXAMPLE, World())
    assert (found.always, found.at_times) == (["old.weight", "old.bias"], [])
    (line,) = found.lines("train")
    assert line.startswith("train: the model does not use 2 parameters: old.weight, old.bias:")
    net.old.requires_grad_(False)
    assert not find_unused(net, EXAMPLE, World())


@pytest.mark.parametrize("p", [0.5, 0.75])
def test_a_layer_that_is_dropped_at_random_is_told_from_one_that_is_left_over(p: float) -> None:
    found = find_unused(Net(p), EXAMPLE, World())
    assert found.always == ["old.weight", "old.bias"]
    assert found.at_times == ["middle.weight", "middle.bias"]
    assert "some steps do not use 2 parameters: middle.weight" in found.lines("train")[1]


def test_outputs_that_are_no_tensors_have_no_gradient() -> None:
    class Talkative(Net):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x), "name": "talkative", "number": 3}

    assert find_unused(Talkative(), EXAMPLE, World()).always == ["old.weight", "old.bias"]


def test_nothing_changes() -> None:
    net = Net(0.5).eval()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    find_unused(net, EXAMPLE, World())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_modules_of_dropout_cost_no_further_trials() -> None:
    net, passes = Net(), list[int]()
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    find_unused(net, EXAMPLE, World())
    assert len(passes) == 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_inside_a_reentrant_checkpoint_are_used() -> None:
    assert find_unused(Net(reentrant=True), EXAMPLE, World()).always == ["old.weight", "old.bias"]


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 2).requires_grad_(False), "no parameter to train: all 2 have requires_grad=False"),
        (nn.ReLU(), "no parameter to train: it has none"),
        (Detached(3, 2), "none of the model's parameters gets a gradient"),
    ],
)
def test_a_model_that_cannot_learn_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_unused(model, EXAMPLE, World())
