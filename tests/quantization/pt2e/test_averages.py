"""pt2e gives averages a range of their own: on their inputs' grid they tie, and runtimes round ties differently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import GraphModule, Interpreter, Node

from dist_train.quantization.pt2e import quantizer
from dist_train.quantization.pt2e.backend import PT2EBackend
from tests.support.overflow import needs_vnni
from tests.support.tiny_nets import calibrate

POOLS: dict[str, Callable[[], nn.Module]] = {
    "global": lambda: nn.AdaptiveAvgPool2d(1),
    "local": lambda: nn.AvgPool2d(2),
}


class Pooled(nn.Module):
    """A pool between convolutions: over 4 x 4 pixels where it is global, else over 2 x 2."""

    def __init__(self, pool: nn.Module, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride, padding=1), nn.ReLU())
        self.pool, self.head = pool, nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stem(x))).flatten(1)


class Averages(Interpreter):
    """Keeps what is averaged and how it is quantized."""

    found: tuple[Tensor, float]

    def run_node(self, node: Node) -> Tensor:
        value: Tensor = super().run_node(node)
        if node.target in quantizer.AVERAGES:
            (quantize,) = node.users
            self.found = value, quantize.args[1]  # type: ignore[assignment]
        return value


def converted(model: nn.Module, images: Tensor) -> GraphModule:
    prepared = calibrate(PT2EBackend().prepare(model.eval(), images[:2]), images).eval()
    prepared.observe(False)
    return PT2EBackend().convert(prepared)


def ties(graph: GraphModule, images: Tensor) -> float:
    """Share of the averages other than 0 that are halfway between two integers, to a thousandth of a step."""
    runner = Averages(graph)
    with torch.no_grad():
        runner.run(images)
    averages, scale = runner.found
    steps = averages[averages != 0].double() / scale
    return float(((steps - steps.floor() - 0.5).abs() < 1e-3).double().mean())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", POOLS)
def test_averages_are_not_halfway_between_two_integers(name: str, images: Tensor) -> None:
    assert ties(converted(Pooled(POOLS[name]()), images), images) < 0.01


@pytest.mark.parametrize("name", POOLS)
def test_on_the_grid_of_what_is_averaged_they_are(name: str, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "_averages", lambda node: False)
    assert ties(converted(Pooled(POOLS[name]()), images), images) > 0.04


def test_of_one_pixel_nothing_is_rounded_twice(images: Tensor) -> None:
    graph = converted(Pooled(nn.AdaptiveAvgPool2d(1), stride=8), images)
    (pool,) = (node for node in graph.graph.nodes if node.target in quantizer.AVERAGES)
    (quantize,) = pool.users
    assert quantize.args[1:3] == pool.args[0].args[1:3]


@pytest.mark.slow
@needs_vnni
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_runtimes_round_averages_as_was_simulated(name: str, runtime: str, images: Tensor) -> None:
    from dist_train.lowering import int8_session

    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    graph = converted(Pooled(POOLS[name]()), images)
    program = export(graph, (images[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))
    call = int8_session.open_in(runtime, int8_session.runtime_bytes(runtime, program, images[:1]), images[:1], 1)
    with torch.no_grad():
        expected = graph(images)
    moved = (call(images) - expected).abs() > 1e-5 * expected.abs().max()
    # Not none: ONNX Runtime's kernels round biases to int32.
    assert moved.double().mean() < 0.05
