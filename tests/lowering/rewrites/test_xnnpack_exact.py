"""Programs that are rewritten for XNNPACK represent the same real numbers, in residual sums and in moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.quantization.pt2e  # noqa: F401  (registers the operators)
from torch import Tensor, nn
from torch.fx import GraphModule

from dist_train import registry
from dist_train.lowering.rewrites.xnnpack import for_xnnpack

pytestmark = pytest.mark.skipif(
    bool(missing := registry.export_formats.entry("executorch").missing()), reason=f"not installed: {missing}"
)
Step = tuple[float, int]  # scale, and zero point of uint8


def in_integers(x: Tensor, step: Step) -> Tensor:
    library, rest = torch.ops.quantized_decomposed, (*step, 0, 255, torch.uint8)
    return library.dequantize_per_tensor(library.quantize_per_tensor(x, *rest), *rest)


def pairs(graph: GraphModule) -> list[tuple[Any, ...]]:
    """Scale and zero point of each quantize operator, in order."""
    return [
        tuple(node.args[1:3])
        for node in graph.graph.nodes
        if "quantized_decomposed.quantize_per_tensor" in str(node.target)
    ]


def answer(program: torch.export.ExportedProgram, one: Tensor) -> Tensor:
    return registry.export_formats.get("executorch")(program, one, 1).call(one)


class Sum(nn.Module):
    """A convolution that all but cancels what is added to it, as PT2E leaves it: in float, and its sum quantized."""

    OTHERS = (0.1, 20)  # -2 to 23.5: the two ends differ, and so do those of the summand

    def __init__(self, sums: Step, ending: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sums, self.ending = sums, ending
        self.register_buffer("weight", torch.full((1, 1, 1, 1), -100, dtype=torch.int8))
        self.register_buffer("scale", torch.tensor([0.00997]))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        library = torch.ops.quantized_decomposed
        weight = library.dequantize_per_channel(self.weight, self.scale, self.zero_point, 0, -128, 127, torch.int8)
        added, other = (in_integers(each, self.OTHERS) for each in x.split(1, 1))
        return in_integers(self.ending(nn.functional.conv2d(added, weight) + other), self.sums)


def summands() -> Tensor:
    """float32 [1, 2, 1, 4000]: what is convolved, and the other summand over all of its range; sums within 0.5 of 0."""
    draws = torch.Generator().manual_seed(1)
    other = 25.4 * torch.rand(4000, generator=draws) - 1.9
    return torch.stack([other + torch.rand(4000, generator=draws) - 0.5, other]).view(1, 2, 1, -1)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "ending",
    [
        nn.Identity(),
        pytest.param(nn.ReLU(), marks=pytest.mark.slow),
        pytest.param(nn.Flatten(), marks=pytest.mark.slow),
        nn.Sequential(nn.ReLU(), nn.Flatten()),
    ],
)
def test_a_residual_summand_is_rounded_as_finely_as_clips_nothing_that_counts(ending: nn.Module) -> None:
    step, one = 0.002, summands()
    zero_point = 0 if "ReLU" in str(ending) else 120
    program = torch.export.export(Sum((step, zero_point), ending), (one,))
    graph = for_xnnpack(program, one)
    expected = program.module()(one)
    assert expected.min() / step == pytest.approx(-zero_point) and expected.max() > 0.25
    # A summand is at most the highest sum minus the lowest other one: the two ranges together, 255 steps of each.
    rounding = (step + Sum.OTHERS[0]) / 2
    difference = (graph(one) - expected).abs().max()
    assert 0.8 * rounding < difference < rounding + step
    away = (answer(program, one) - graph(one)).abs() > 1.5 * step
    assert away.float().mean() < 0.01  # a kernel may round a half the other way


class Moved(nn.Module):
    """Integers that are moved, and then quantized by another scale, or by the same with another zero point."""

    FIRST = (0.02, 3)

    def __init__(self, move: Callable[[Tensor], Tensor], after: Step) -> None:
        super().__init__()
        self.move, self.after = move, after

    def forward(self, x: Tensor) -> Tensor:
        return in_integers(self.move(in_integers(x, self.FIRST)), self.after)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda x: x.reshape(x.shape[0], 2, -1),
    "view": lambda x: x.view(x.shape[0], -1, 2),
    "flatten": lambda x: x.flatten(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "two": lambda x: x.permute(0, 2, 3, 1).reshape(1, 8, 3),
    "three": lambda x: x.permute(0, 2, 3, 1).reshape(1, 8, 3).transpose(1, 2),
}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("move", "after"),
    [
        *(pytest.param(move, (0.07, 11), marks=[] if move == "three" else pytest.mark.slow) for move in MOVES),
        ("reshape", (0.02, 40)),
        pytest.param("two", (0.02, 40), marks=pytest.mark.slow),
    ],
)
def test_integers_keep_their_scale_while_they_are_moved(move: str, after: Step) -> None:
    one = torch.linspace(-1, 4, 24).view(1, 3, 2, 4)
    module = Moved(MOVES[move], after)
    program = torch.export.export(module, (one,))
    graph = for_xnnpack(program, one)
    assert torch.equal(graph(one), module(one))
    count = {"two": 2, "three": 3}.get(move, 1)
    signed = [(scale, zero_point - 128) for scale, zero_point in (Moved.FIRST, after)]
    assert pairs(graph) == [signed[0]] * (1 + count) + [signed[1]]
    assert torch.equal(answer(program, one), module(one))
