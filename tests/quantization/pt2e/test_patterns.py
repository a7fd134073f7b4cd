"""Patterns are exported for the model's own convolutions alone, and what is prepared is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from dist_train.quantization.pt2e import pattern_cache
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from tests.support.tiny_nets import TinyNet

PER_KIND = 3  # with and without a bias, and what is searched for


class UpAndDown(nn.Module):
    """A convolution and a transposed one, both before a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn2(self.up(torch.relu(self.bn1(self.down(x)))))).mean((2, 3)))


def described(prepared: PreparedGraph) -> list[str]:
    """Returns the graph, its annotations' effects and the state, as text."""
    module = prepared.graph_module()
    tensors = [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in prepared.state_dict().items()]
    quantizers = [f"{name}: {each}" for name, each in prepared.get_submodule("quantizers").named_children()]
    # The keys of a stack are addresses.
    layers = [f"{node.name} {list(node.meta.get('nn_module_stack', {}).values())}" for node in module.graph.nodes]
    return [module.code, *tensors, *quantizers, *layers]


@contextmanager
def all_kinds() -> Iterator[None]:
    """Leaves torchao's search for all kinds of convolution as it is."""
    yield


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "kinds"), [(TinyNet, 1), (UpAndDown, 2)])
def test_only_the_models_own_convolutions_are_searched_for(
    kind: type[nn.Module], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = kind().eval(), torch.zeros(1, 3, 16, 16)
    monkeypatch.setattr(pattern_cache, "_known", {})
    few = described(PT2EBackend().prepare(model, example))
    assert len(pattern_cache._known) == PER_KIND * kinds
    monkeypatch.setattr(pattern_cache, "_of_known_convolutions", all_kinds)
    assert described(PT2EBackend().prepare(model, example)) == few
    assert len(pattern_cache._known) == PER_KIND * 4
