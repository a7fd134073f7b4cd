"""Two products of 255 and 127 overflow 16 bits, in which CPUs without VNNI add them.

`qat.engine` keeps clear of that.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from dist_train.cluster.instructions import sums_overflow
from dist_train.config.stages import QATConfig
from dist_train.quantization.backend import build_backend
from dist_train.quantization.fake_quantize import NarrowActivationFakeQuantize
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.rules import RuleConfig
from tests.support.tiny_nets import calibrate


class Sums(nn.Module):
    """A convolution and a Linear whose products are as large as integers make them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        for weight in (self.conv.weight, self.fc.weight):
            nn.init.ones_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    """Mostly at the upper end of their range, as a bright image's pixels are."""
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).pow(0.1)


def prepared(engine: str, images: Tensor, *rules: RuleConfig) -> PreparedModel:
    made = calibrate(PT2EBackend(engine=engine).prepare(Sums().eval(), images[:2], rules), images).eval()
    made.observe(False)
    return made


@pytest.mark.parametrize(("engine", "largest"), [("auto", 255), ("onednn", 255), ("x86", 127), ("fbgemm", 127)])
def test_the_engine_sets_the_steps_of_activations(engine: str, largest: int, images: Tensor) -> None:
    made = prepared(engine, images)
    assert {each.range_max for each in made.fake_quantizers} == {largest}
    with torch.no_grad():
        expected, converted = made(images), PT2EBackend(engine=engine).convert(made)
        assert (converted(images) - expected).abs().max() / expected.abs().max() < 0.01


def test_a_run_s_setting_reaches_the_backend(images: Tensor) -> None:
    backend = build_backend(QATConfig(engine="x86"))
    made = backend.prepare(Sums().eval(), images[:2])
    assert all(isinstance(each, NarrowActivationFakeQuantize) for each in made.fake_quantizers)


def test_rules_for_activations_hold_with_it(images: Tensor) -> None:
    rules = [RuleConfig.model_validate({"match": "fc", "activation": {"bits": 4}})]
    made = prepared("x86", images, *rules)
    assert sorted({each.range_max for each in made.fake_quantizers}) == [15, 127]


@pytest.mark.heavy
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("engine", ["auto", "x86"])
def test_runtimes_overflow_only_where_the_cpu_and_the_engine_say_so(runtime: str, engine: str, images: Tensor) -> None:
    from dist_train.lowering import int8_session

    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    graph = PT2EBackend(engine=engine).convert(prepared(engine, images))
    with torch.no_grad():
        expected = graph(images)
        program = export(graph, (images[:2],), dynamic_shapes=({0: Dim("batch")},))
        call = int8_session.open_in(runtime, int8_session.runtime_bytes(runtime, program, images[:2]), images[:2], 1)
        difference = float((call(images) - expected).abs().max() / expected.abs().max())
    overflows = sums_overflow() and engine == "auto"
    assert difference > 0.1 if overflows else difference < 0.05, difference
