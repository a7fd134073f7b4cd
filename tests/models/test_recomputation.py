"""Activation checkpointing: gradients to the bit, statistics and ranges that move once, fewer kept activations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, ModelError
from dist_train.models.recomputation import Recomputation
from dist_train.quantization.backend import build_backend
from dist_train.quantization.ranges import Ranges
from dist_train.training.loop import fit
from dist_train.training.parts import resolve_parts
from tests.support.one_net_all_backends import StubNet
from tests.support.tiny_nets import calibrate
from tests.support.training_loops import CLASSES, flat, make


class Block(nn.Module):
    """A layer with dropout and a batch norm, with a cumulative average of its own as a buffer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.dropout(torch.relu(self.norm(self.conv(x)))) * (1 + 0.1 * self.calls)


def net() -> nn.Module:
    torch.manual_seed(1)
    blocks = nn.Sequential(Block(1), Block(4))
    return nn.Sequential(blocks, nn.Flatten(), nn.Linear(64, CLASSES))


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Returns gradients and buffers after two micro-batches."""
    torch.manual_seed(5)
    model.train()
    for rows in (x[:3], x[3:]):
        model(rows).square().sum().backward()
    return [*(each.grad for each in model.parameters() if each.grad is not None), *model.buffers()]


def test_gradients_and_buffers_are_those_without_it() -> None:
    model, x = net(), torch.rand(8, 1, 4, 4)
    plain, recomputed = copy.deepcopy(model), copy.deepcopy(model)
    Recomputation(recomputed, ["0.0", "0.1"]).turn(True)
    calls = []
    recomputed[0][1].conv.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index]
    left, right = step(plain, x), step(recomputed, x)
    assert len(left) == len(right) and all(torch.equal(one, two) for one, two in zip(left, right, strict=True))
    assert len(calls) == 4, "each of two forwards ran again"


def test_turned_off_the_model_is_as_it_was() -> None:
    model = net()
    recomputation = Recomputation(model, ["0.0"])
    recomputation.turn(True)
    copied = copy.deepcopy(model)
    assert copied[0][0].__dict__["forward"].args[1] is copied[0][0]  # type: ignore[index]
    recomputation.turn(False)
    assert "forward" not in model[0][0].__dict__  # type: ignore[index]


def test_activations_are_not_kept() -> None:
    kept = []
    for names in ([], ["0.0", "0.1"]):
        model = net()
        Recomputation(model, names).turn(True)
        kept.append(_kept(model, torch.rand(8, 1, 4, 4)))
    assert kept[1] < 0.5 * kept[0]


def trained(names: list[str]) -> tuple[list[float], list[float]]:
    model = net()
    made = make(World(), model, micro=3, compile=False, epochs=2, config={"ema_decay": 0.9})
    made.run.learner._recomputation = Recomputation(model, names)
    fit(made.run, None)
    return flat(model), [float(each.double().sum()) for each in model.buffers()]


def test_a_run_ends_with_the_same_model() -> None:
    assert trained([]) == trained(["0.0", "0.1"])


@pytest.mark.heavy
@pytest.mark.parametrize("backend", ["pt2e", "eager"])
@pytest.mark.parametrize("frozen", [False, True])
def test_ranges_and_statistics_of_qat_learn_once(backend: str, frozen: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 8, 8)
    chosen = build_backend(Config.model_validate({"qat": {"backend": backend}}).qat)
    plain = calibrate(chosen.prepare(StubNet().eval(), x), x)
    plain.keep_dropout()
    if frozen:
        plain.freeze_batch_norm()
    recomputed = copy.deepcopy(plain)
    recomputed.recompute(["conv1", "conv2", "dropout"])
    kept = [_kept(each, x) for each in (plain, recomputed)]
    assert kept[1] < kept[0]
    left, right = step(plain, x), step(recomputed, x)
    assert len(left) == len(right) and all(torch.equal(one, two) for one, two in zip(left, right, strict=True))
    assert torch.equal(Ranges(plain).observed(), Ranges(recomputed).observed())
    recomputed.recompute([])
    left, right = step(plain, x), step(recomputed, x)
    assert all(torch.equal(one, two) for one, two in zip(left, right, strict=True))


def _kept(model: nn.Module, x: torch.Tensor) -> int:
    """Returns the number of elements that autograd saves of a copy's forward."""
    sizes = list[int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        copy.deepcopy(model).train()(x)
    return sum(sizes)


@pytest.mark.heavy
def test_pieces_of_layers_that_overlap_are_one() -> None:
    """A residual sum reads what comes before the layer, and a layer that is called twice spans what is between."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(self.two(self.one(x)) + x)).mean((2, 3))

    torch.manual_seed(0)
    x = torch.rand(8, 3, 8, 8)
    plain = calibrate(build_backend(Config().qat).prepare(Twice().eval(), x), x)
    recomputed = copy.deepcopy(plain)
    recomputed.recompute(["one", "two"])
    left, right = step(plain, x), step(recomputed, x)
    assert all(torch.equal(one, two) for one, two in zip(left, right, strict=True))


class ListLinear(nn.Linear):
    """A layer that takes a list of one tensor."""

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return super().forward(inputs[0])


@pytest.mark.parametrize("listed", [False, True])
def test_an_input_that_is_changed_in_place_is_an_error(listed: bool) -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = (ListLinear if listed else nn.Linear)(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            y = self.layer([x] if listed else x)
            x += y
            return x

    model = Adding()
    Recomputation(model, ["layer"]).turn(True)
    # torch sees it where the input itself is an argument, ours in trees of arguments, too.
    with pytest.raises(ModelError if listed else RuntimeError, match=r"in.?place"):
        model(torch.rand(2, 4)).sum().backward()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("0.?", ("0.0", "0.1")), (["0", "0.1"], ("0",)), ({"type": "Block"}, ("0.0", "0.1")), ("*", ("0", "1", "2"))],
)
def test_the_outermost_modules_are_computed_anew(pattern: Any, expected: tuple[str, ...]) -> None:
    config = Config.model_validate({"train": {"activation_checkpointing": pattern}})
    assert resolve_parts(config, "train", net()).recomputed == expected


def test_a_pattern_of_nothing_is_refused() -> None:
    config = Config.model_validate({"train": {"activation_checkpointing": "blocks.*"}})
    with pytest.raises(ConfigError, match="'blocks.\\*' matches no module"):
        resolve_parts(config, "train", net())
