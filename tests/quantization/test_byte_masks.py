"""Gradients through clamps and fake quantization equal torch's, and a compiled step keeps bytes for them, not bools."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule, symbolic_trace

from dist_train.quantization.byte_masks import clamp_with_byte_mask, use_byte_masks
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 0.25),
    "in_place": nn.ReLU(inplace=True),
}


class Recorder:
    """A backend of torch.compile: Inductor without its kernels. It records the dtypes that a forward keeps."""

    def __init__(self) -> None:
        self.kept: list[torch.dtype] = []

    def __call__(self, module: GraphModule, inputs: Any) -> Any:
        return compile_fx(module, inputs, inner_compile=self._compile)

    def _compile(self, module: GraphModule, inputs: Any, **options: Any) -> Any:
        if not options.get("is_backward"):
            results = module.graph.output_node().all_input_nodes
            self.kept += [node.meta["val"].dtype for node in results if isinstance(node.meta.get("val"), Tensor)]
        return make_boxed_func(module.forward)


class Residual(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.stem, self.conv1, self.conv2 = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return self.head(self.activation(y + x))


def prepared(activation: nn.Module) -> PreparedGraph:
    torch.manual_seed(0)
    model = PT2EBackend().prepare(Residual(activation).train(), torch.zeros(2, 3, 12, 12))
    for fake_quantizer in model.fake_quantizers:
        if isinstance(fake_quantizer, ActivationFakeQuantize):
            # Narrow, so that it clips.
            fake_quantizer.low.fill_(-0.3), fake_quantizer.high.fill_(0.6)
            fake_quantizer.scale.fill_(0.9 / 255), fake_quantizer.zero_point.fill_(85.0)
            fake_quantizer.calibrated = True
    return model.train()


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    forward(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "activation", [pytest.param(name, marks=[] if name == "relu6" else pytest.mark.slow) for name in ACTIVATIONS]
)
def test_a_compiled_step_keeps_no_bools_and_has_the_gradients_of_an_eager_one(activation: str) -> None:
    model = prepared(ACTIVATIONS[activation])
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    recorder = Recorder()
    other = copy.deepcopy(model)
    expected = gradients(other, other, x)
    actual = gradients(model, torch.compile(model, backend=recorder, dynamic=False), x)
    assert torch.uint8 in recorder.kept and torch.bool not in recorder.kept
    assert len(actual) == len(expected) > 5
    for mine, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "instead"),
    [("fake_quantize.equal_mask", torch.eq), ("pt2e.prepared_graph.use_byte_masks", lambda graph: None)],
)
def test_without_it_a_compiled_step_keeps_bools(
    name: str, instead: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"dist_train.quantization.{name}", instead)
    model, recorder = prepared(nn.ReLU()), Recorder()
    gradients(model, torch.compile(model, backend=recorder, dynamic=False), torch.randn(4, 3, 12, 12))
    assert torch.bool in recorder.kept


@pytest.mark.parametrize(("low", "high"), [(0.0, float("inf")), (0.0, 6.0), (-1.0, 0.5)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_at_the_bounds_themselves_are_torchs(low: float, high: float, compiled: bool) -> None:
    x = torch.tensor([-2.0, -1.0, -0.0, 0.0, 0.25, 0.5, 6.0, 7.0])
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    function = torch.compile(clamp_with_byte_mask, backend="aot_eager") if compiled else clamp_with_byte_mask
    result = function(mine, low, high)
    expected = torch.relu(plain) if high == float("inf") else torch.nn.functional.hardtanh(plain, low, high)
    assert torch.equal(result, expected)
    result.sum().backward()
    expected.sum().backward()
    assert mine.grad is not None and plain.grad is not None
    assert torch.equal(mine.grad, plain.grad)


def test_a_tensor_that_is_written_in_place_and_read_again_is_left_alone() -> None:
    def net(x: Tensor) -> Tensor:
        y = x * 1.0
        return torch.ops.aten.relu_.default(y) + y

    module = symbolic_trace(net)
    use_byte_masks(module.graph)
    module.recompile()
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(module(x), net(x))
