"""Grids of the fx backend's activations: none for float outputs, and as many bits as the kernels allow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub

from dist_train.config.stages import RuleConfig
from dist_train.programs.torchscript import load_script
from dist_train.quantization.layer_sqnr import layer_sqnr
from dist_train.quantization.torch_ao import fx
from dist_train.quantization.torch_ao.eager import EagerBackend
from dist_train.quantization.torch_ao.float_output import FloatOutputLinear
from dist_train.quantization.torch_ao.fx import FXBackend
from dist_train.quantization.torch_ao.integer_model import IntegerModel
from dist_train.quantization.torch_ao.prepared_modules import TracedModules
from tests.support.overflow import needs_vnni
from tests.support.tiny_nets import calibrate

ENGINES = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
VNNI_ENGINES = [pytest.param(each, marks=needs_vnni) if each == "onednn" else each for each in ENGINES]
LEAST = 50.0  # dB, as in test_fx_float_parts.py


class Net(nn.Module):
    """Residual, with ReLU6 as a module and ReLU as a function, and a head whose result is reshaped."""

    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.last(x + self.branch(x)))
        return self.head(x.mean((2, 3))).flatten(1)


def prepared(model: nn.Module, images: Tensor, engine: str, rules: Sequence[RuleConfig] = ()) -> TracedModules:
    made = FXBackend(engine).prepare(model.eval(), images[:2], rules)
    result = calibrate(made, images).eval()
    result.observe(False)
    assert isinstance(result, TracedModules)
    return result


def converted(model: TracedModules, engine: str) -> IntegerModel:
    result = FXBackend(engine).convert(model)
    assert isinstance(result, IntegerModel)
    return result


def images(rows: int = 64) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same_decisions(engine: str) -> float:
    """Returns the agreement of int8 with the float model, in a batch with one sample whose logit is 768."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(256, 6, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(6, 256, generator=generator).sign())
    samples = 0.3 * torch.randn(512, 256, generator=generator)
    samples[0] = 3 * head.weight[0].detach()
    model = prepared(nn.Sequential(head), samples, engine)
    same = converted(model, engine)(samples).argmax(1) == head(samples).argmax(1)
    return float(same.float().mean())


@pytest.mark.parametrize("engine", ENGINES)
def test_one_sample_with_large_logits_does_not_spoil_the_others(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_decisions(engine) > 0.95
    monkeypatch.setattr(fx, "float_results", lambda _: None)
    assert same_decisions(engine) < 0.8, "torch.ao rounds logits to 8 bits"


@pytest.mark.parametrize("engine", VNNI_ENGINES)
def test_each_engine_computes_what_is_simulated(engine: str) -> None:
    torch.manual_seed(0)
    model = prepared(Net(), images(), engine)
    noise = layer_sqnr(model, converted(model, engine), images())
    assert {"stem.0", "branch", "last", "head"} <= set(noise), "clamped layers and the head are compared, too"
    assert min(noise.values()) > LEAST


@pytest.mark.parametrize("engine", VNNI_ENGINES)
@pytest.mark.parametrize("clamp", [nn.ReLU6(), nn.Hardtanh(-0.2, 0.5), lambda x: torch.clamp(x, -0.2, 0.5)])
def test_each_engine_clamps_in_the_order_in_memory_that_its_convolutions_answer_in(engine: str, clamp: Any) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.clamp, self.last = nn.Conv2d(3, 16, 3), clamp, nn.Conv2d(16, 4, 1)

        def forward(self, clip: Tensor) -> Tensor:  # an input that is named as a method is
            return self.last(self.clamp(self.conv(clip)))

    torch.manual_seed(0)
    model = prepared(Clamped(), images(), engine)
    integers = converted(model, engine)
    assert min(layer_sqnr(model, integers, images()).values()) > LEAST
    simulated = model(images())
    # Not 50 dB: a rounding in one layer is another sum in the next.
    assert (integers(images()) - simulated).square().mean() < 1e-3 * simulated.square().mean()


def test_an_input_may_have_the_name_of_a_method() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(view), view

    model = prepared(Both(), images(), ENGINES[0])
    torch.testing.assert_close(converted(model, ENGINES[0])(images())[1], images(), atol=0.1, rtol=0)


def grids(model: TracedModules) -> dict[str, int]:
    """The integer that the top of each activation's range is mapped to."""
    quantizers = model.get_submodule("model.quantizers")
    return {name: module.range_max for name, module in quantizers.named_children() if hasattr(module, "range_max")}


def test_what_a_product_reads_has_the_bits_that_its_sums_allow_and_the_rest_has_all() -> None:
    model = prepared(Net(), images(), "x86") if "x86" in ENGINES else pytest.skip("needs torch's x86 kernels")
    found = grids(model)
    assert found.pop("add_input") == 255, "the branch's result, which only the sum reads"
    assert found.pop("relu_input") == 255, "what only a mean in floating point reads"
    assert found == {"stem_0_input": 127, "branch_input": 127, "last_input": 127, "head_input": 127}, found


def test_a_clamp_has_the_grid_of_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, loud = Net(), 50 * images()
    model = prepared(net, loud, ENGINES[0])
    # Its ReLU6 leaves 0..6 of some hundreds.
    assert float(model.get_submodule("model.quantizers.branch_input").high) == 6
    assert min(layer_sqnr(model, converted(model, ENGINES[0]), loud).values()) > LEAST
    monkeypatch.setattr(fx, "saturating_clamps", lambda _: None)
    other = prepared(net, loud, ENGINES[0])
    assert max(float(module.high) for module in other.fake_quantizers[1:]) > 50


def test_a_reader_beside_the_clamp_keeps_the_layers_own_grid() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head(torch.relu(y) + y).flatten(1)

    torch.manual_seed(0)
    model = prepared(Both(), images(), ENGINES[0])
    assert min(float(module.low) for module in model.fake_quantizers[1:]) < 0
    assert min(layer_sqnr(model, converted(model, ENGINES[0]), images()).values()) > LEAST


@pytest.mark.parametrize("rules", [[], [{"match": "head", "weight": {"granularity": "tensor"}}]])
def test_the_heads_weights_are_integers_in_the_file(rules: list[dict[str, object]]) -> None:
    torch.manual_seed(0)
    outputs = 4096
    model = prepared(Net(outputs), images(), ENGINES[0], [RuleConfig.model_validate(rule) for rule in rules])
    integers = converted(model, ENGINES[0])
    assert isinstance(integers.model.get_submodule("head"), FloatOutputLinear)
    program = FXBackend(ENGINES[0]).serialize(integers, images())
    assert len(program.data) < 2 * 16 * outputs + 4 * 2 * outputs + 30_000, (
        "16 bytes of weights, a scale and a bias an output"
    )
    state = torch.load(io.BytesIO(program.extra["state_dict.pt"]), weights_only=True)
    assert state["head.weight"].dtype == torch.int8
    torch.testing.assert_close(load_script(program.data)(images()), integers(images()), rtol=0, atol=0)


class Perceptron(nn.Module):
    """On the means of a map: a hidden Linear with a clamp, and a head, which may be the same Linear."""

    def __init__(self, clamp: nn.Module, shared: bool) -> None:
        super().__init__()
        self.conv, self.hidden, self.clamp = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 16), clamp
        self.head = self.hidden if shared else nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.clamp(self.hidden(self.conv(x).mean((2, 3)))))


@pytest.mark.parametrize("shared", [False, True])
def test_of_linears_only_the_head_gives_floats(shared: bool) -> None:
    torch.manual_seed(0)
    model = prepared(Perceptron(nn.ReLU6(), shared), images(), ENGINES[0])
    integers = converted(model, ENGINES[0])
    heads = [name for name, module in integers.model.named_modules() if isinstance(module, FloatOutputLinear)]
    assert heads == ["hidden" if shared else "head"]
    assert min(layer_sqnr(model, integers, images()).values()) > LEAST


def test_two_heads_that_are_one_linear() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.head(y.mean((2, 3))), self.head(y.amax((2, 3)))

    torch.manual_seed(0)
    model = prepared(Siamese(), images(), ENGINES[0])
    assert layer_sqnr(model, converted(model, ENGINES[0]), images())["head"] > LEAST


def test_a_layer_called_twice_keeps_a_grid_that_suits_all_its_readers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.both, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.last(nn.functional.relu6(self.both(x))).mean((2, 3)) + self.both(x).mean((2, 3))[:, :4]

    torch.manual_seed(0)
    engine = "x86" if "x86" in ENGINES else ENGINES[0]
    model = prepared(Twice(), images(), engine)
    both = [name for name in grids(model) if name.startswith(("relu6_input", "mean_1_input"))]
    assert len(both) == 2, grids(model)
    for name in both:
        quantizer = model.get_submodule(f"model.quantizers.{name}")
        assert float(quantizer.low) < 0, "the clamp's own grid would cut off what the other reader needs"
        assert engine != "x86" or quantizer.range_max == 127, "the last convolution reads these integers"


@pytest.mark.parametrize("both", [False, True])
def test_eager_mode_keeps_integers_that_more_than_a_stub_reads(both: bool) -> None:
    class Stubs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant, self.add = QuantStub(), DeQuantStub(), FloatFunctional()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)

        def fuse_model(self, is_qat: bool) -> None:
            assert is_qat

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            first, second = self.first(x), self.second(x)
            others = self.add.add(first, second) if both else second
            return torch.softmax(self.dequant(first), -1) + self.dequant(others)

    torch.manual_seed(0)
    model = calibrate(EagerBackend(ENGINES[0]).prepare(Stubs().eval(), images()[:2]), images()).eval()
    model.observe(False)
    integers = EagerBackend(ENGINES[0]).convert(model)
    assert isinstance(integers, IntegerModel)
    heads = {name for name, module in integers.model.named_modules() if isinstance(module, FloatOutputLinear)}
    assert heads == (set() if both else {"first", "second"})
    assert min(layer_sqnr(model, integers, images()).values()) > LEAST
