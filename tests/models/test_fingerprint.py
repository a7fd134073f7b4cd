"""A fingerprint shows what a model computes: each change of its code is found and named, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.models.fingerprint import differences, fingerprint


class Net(nn.Module):
    """Its layers, and what forward does between them, can be exchanged without another name in the state."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.relu, swapped: bool = False, **settings: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=int(settings.get("stride", 1)), padding=1)
        self.bn = nn.BatchNorm2d(4, eps=settings.get("eps", 1e-5), momentum=settings.get("momentum", 0.1))
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.dropout = nn.Dropout(settings.get("p", 0.5))
        self.between, self.swapped, self.factor = between, swapped, settings.get("factor", 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.bn(self.conv(x)))
        first, second = (self.right, self.left) if self.swapped else (self.left, self.right)
        return self.dropout(second(first(x)) * self.factor).mean((2, 3))


def of(model: nn.Module) -> list[list[object]]:
    return fingerprint(model, torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (Net(stride=2), "conv: convolution stride [1, 1] -> [2, 2]"),
        (Net(eps=1e-3), "bn: native_batch_norm eps 1e-05 -> 0.001"),
        (Net(momentum=0.01), "bn: native_batch_norm momentum 0.1 -> 0.01"),
        (Net(p=0.2), "dropout: bernoulli_.float p 0.5 -> 0.8"),
        (Net(factor=3.0), "forward: mul.Tensor other 2.0 -> 3.0"),
        (Net(between=F.gelu), "forward: gelu: it was relu"),
        (Net(between=lambda x: x), "forward: relu: it is gone"),
        (Net(between=lambda x: F.relu(x).abs()), "forward: abs: it is new"),
        (Net(between=lambda x: F.relu(x) + torch.tensor(0.5)), "forward: add.Tensor: it is new"),
        (Net(swapped=True), "right: convolution: it is new"),
    ],
    ids=["stride", "eps", "momentum", "dropout", "factor", "operator", "less", "more", "constant", "order"],
)
def test_a_change_of_the_code_with_the_same_state_is_named(changed: nn.Module, line: str) -> None:
    original = Net()
    assert changed.state_dict().keys() == original.state_dict().keys()
    assert any(found.startswith(line) for found in differences(of(original), of(changed)))


def test_weights_inputs_mode_and_a_module_s_own_name_change_nothing() -> None:
    class Renamed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = self.dropout
            del self.dropout

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(self.conv(x)))
            return self.drop(self.right(self.left(x)) * 2.0).mean((2, 3))

    torch.manual_seed(1)
    other = Net().eval()
    expected = of(Net())
    assert fingerprint(other, torch.rand(2, 1, 8, 8)) == expected
    assert not other.training
    assert differences(expected, of(Renamed())) == []


def test_it_survives_json_and_leaves_model_and_generator_alone() -> None:
    model = Net()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found = of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert differences(json.loads(json.dumps(found)), of(model)) == []
    assert not model.conv._forward_hooks and not model.conv._forward_pre_hooks


def test_a_message_shows_the_first_differences_and_counts_the_others() -> None:
    plain, other = (nn.Sequential(*(kind() for _ in range(9))) for kind in (nn.ReLU, nn.GELU))
    lines = differences(of(plain), of(other))
    assert lines[0] == "0: gelu: it was relu"
    assert len(lines) == 6 and lines[-1] == "... and 4 more"
