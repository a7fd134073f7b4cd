"""int8 in ExecuTorch: XNNPACK's integer kernels run every int8 layer with the same outputs, or a reason is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train import registry
from dist_train.config.stages import RuleConfig
from dist_train.lowering.base import LoweringUnavailable
from dist_train.lowering.rewrites.xnnpack import for_xnnpack
from dist_train.quantization.pt2e.backend import PT2EBackend, export_converted
from dist_train.quantization.ranges import Ranges
from tests.support.converted_nets import images

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        bool(missing := registry.export_formats.entry("executorch").missing()), reason=f"not installed: {missing}"
    ),
]


class Residual(nn.Module):
    """Has the parts of ResNet and MobileNetV2: a residual sum, a depthwise convolution with ReLU6, and dropout."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise, self.activation = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16), activation()
        self.pointwise, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 10)
        self.head.weight.data *= 8  # logits far enough apart for argmax to mean something

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.conv(x))
        x = torch.relu(self.pointwise(self.activation(self.depthwise(x))))
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(nn.functional.dropout(x, 0.2, self.training))


def quantized(net: nn.Module, rules: Sequence[dict[str, Any]] = ()) -> tuple[nn.Module, ExportedProgram]:
    backend, batch = PT2EBackend(), images(64)
    prepared = backend.prepare(net, batch[:2], [RuleConfig.model_validate(each) for each in rules]).eval()
    ranges = Ranges(prepared)
    prepared(batch)
    ranges.update(ranges.observed(), 1.0)
    converted = backend.convert(prepared)
    return converted, export_converted(converted, batch[:2])


def residual(activation: type[nn.Module] = nn.ReLU6) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Residual(activation).eval()


def write(program: ExportedProgram | nn.Module) -> Any:
    return registry.export_formats.get("executorch")(program, images(1), 1)


def operators(program: ExportedProgram) -> tuple[Counter[str], Counter[str]]:
    """Those outside and those inside of XNNPACK's part, as ExecuTorch divides what it is given."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(for_xnnpack(program, images(1)), (images(1),))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).exported_program().graph_module
    outside, inside = Counter[str](), Counter[str]()
    parts = [each.original_module.graph_module for name, each in edge.named_children() if name.startswith("lowered_")]
    for graph, counted in [(edge, outside), *((each, inside) for each in parts)]:
        counted.update(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
    return outside, inside


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param([], id="channel"),
        pytest.param(
            [{"match": {"type": "*"}, "weight": {"granularity": "tensor"}}], id="tensor", marks=pytest.mark.slow
        ),
    ],
)
def test_int8_answers_as_in_process(rules) -> None:
    converted, program = quantized(residual(), rules)
    written = write(program)
    with torch.no_grad():
        expected = converted(images(32))
    answer = written.call(images(32))
    assert (answer - expected).abs().max() < 0.02 * expected.abs().max()
    varying = expected - expected.mean(0)
    assert (answer - expected).norm() < 0.3 * varying.norm()
    assert written.runtime.startswith("executorch ")


@pytest.mark.slow
def test_every_int8_layer_runs_in_integers_and_what_is_skipped_in_float() -> None:
    _, program = quantized(residual(), [{"match": "stem", "skip": True}])
    outside, inside = operators(program)
    assert set(outside) == {"executorch_call_delegate", "getitem"}
    assert inside["aten.convolution.default"] + inside["aten.linear.default"] == 5
    assert inside["quantized_decomposed.dequantize_per_channel.default"] == 4  # of the weights; a float layer has none
    # The last layer's input, and that of the convolution that is added to what is float: their outputs are float.
    assert inside["quantized_decomposed.choose_qparams.tensor"] == 2


@pytest.mark.slow
def test_a_channel_whose_bias_would_overflow_int32_stays_right() -> None:
    net = residual()
    with torch.no_grad():
        net.conv.weight[3] *= 1e-9
        net.conv.bias[3] = 3.0
    converted, program = quantized(net)
    with torch.no_grad():
        expected = converted(images(8))
    assert (write(program).call(images(8)) - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.slow
def test_the_program_is_not_changed() -> None:
    net = residual().to(memory_format=torch.channels_last)
    with torch.no_grad():
        net.conv.weight[3] *= 1e-9  # so that a scale must grow
        net.conv.bias[3] = 3.0
    _, program = quantized(net)
    before, answer = str(program.graph), program.module()(images(4))
    tensors = {name: (value.clone(), value.stride()) for name, value in program.state_dict.items()}
    write(program)
    assert str(program.graph) == before
    for name, (value, stride) in tensors.items():
        assert torch.equal(program.state_dict[name], value) and program.state_dict[name].stride() == stride
    assert torch.equal(program.module()(images(4)), answer)


@pytest.mark.slow
def test_a_model_in_channels_last_goes_in_float_and_int8() -> None:
    net = residual().to(memory_format=torch.channels_last)
    converted, program = quantized(net)
    for model, source, bound in ((net, net, 1e-4), (converted, program, 0.02)):
        with torch.no_grad():
            expected = model(images(3))
            assert (write(source).call(images(3)) - expected).abs().max() < bound * expected.abs().max()
    assert net.get_parameter("conv.weight").is_contiguous(memory_format=torch.channels_last), "the caller's stays"


def test_what_an_exporter_fails_on_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch import exir

    for error in (AssertionError("one"), KeyError("two"), exir.error.InternalError("three")):

        def fail(*arguments: object, error: Exception = error, **settings: object) -> None:
            raise error

        monkeypatch.setattr(exir, "to_edge_transform_and_lower", fail)
        with pytest.raises(LoweringUnavailable, match=f"ExecuTorch cannot lower this model: .*{error.args[0]}"):
            write(nn.Flatten())


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_weights_with_zero_points_are_refused_by_their_scheme(granularity: str) -> None:
    net = residual()
    with torch.no_grad():
        net.conv.weight += 0.1
    rule = {"match": "conv", "weight": {"scheme": "affine", "granularity": granularity}}
    with pytest.raises(LoweringUnavailable, match="weights with zero points .scheme affine in qat.rules."):
        write(quantized(net, [rule])[1])


@pytest.mark.parametrize("part", ["weight", "activation"])
def test_fewer_than_eight_bits_are_refused(part: str) -> None:
    with pytest.raises(LoweringUnavailable, match="8 bits only"):
        write(quantized(residual(), [{"match": "conv", part: {"bits": 4}}])[1])


@pytest.mark.slow
def test_an_int8_layer_that_would_be_computed_in_float_is_refused() -> None:
    _, program = quantized(residual(nn.Hardswish))
    with pytest.raises(
        LoweringUnavailable, match="no integer kernel for 1 of the layers.*1 of them grouped.*Hardswish"
    ):
        write(program)
