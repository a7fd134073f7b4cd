"""The PT2E backend: prepared models equal float ones, converted models fake-quantized ones; others are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.quantization.backend import QuantizationBackend
from dist_train.quantization.fx_nodes import layer_of
from dist_train.quantization.pt2e import graph_rewrite
from dist_train.quantization.pt2e.backend import PT2EBackend, export_converted
from dist_train.quantization.pt2e.prepared_graph import Blueprint, PreparedGraph
from tests.support.tiny_nets import calibrate, draw_statistics

BOUND = 1e-4


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def float_error(prepared: PreparedGraph, model: nn.Module, x: Tensor) -> float:
    prepared.fake_quantize(False)
    with torch.no_grad():
        error = relative(prepared.eval()(x), model.eval()(x))
    prepared.fake_quantize(True)
    return error


def bytes_of(model: nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def rule(match: str) -> RuleConfig:
    return RuleConfig(match=match, skip=True)


def test_the_backend_keeps_the_protocol() -> None:
    assert isinstance(PT2EBackend(), QuantizationBackend)


def test_every_literal_is_the_float_models(prepared: PreparedGraph) -> None:
    graph = prepared.graph_module().graph
    settings = {graph_rewrite.batch_norm_tensors(node)[3]: node.args[5:8] for node in graph_rewrite.batch_norms(graph)}
    assert settings == {"bn1.running_var": (False, 0.01, 1e-3), "bn2.running_var": (False, 0.3, 1e-2)}
    folded = graph_rewrite.folded_batch_norms(graph)
    assert [node.eps.args[1] for node in folded] == [1e-3, 1e-2]
    assert all(node.quantized for node in folded)


def test_prepared_equals_float_and_a_planted_eps_does_not(
    tiny: nn.Module, prepared: PreparedGraph, images: Tensor
) -> None:
    assert float_error(prepared, tiny, images) < BOUND
    graph = prepared.graph_module()
    for node in graph_rewrite.batch_norms(graph.graph):
        node.args = (*node.args[:7], 1e-5, *node.args[8:])  # what PT2E leaves
    graph.recompile()
    prepared.fake_quantize(False)
    assert relative(graph(images), tiny(images)) > 100 * BOUND, "the measure sees a wrong eps"


def test_torchao_still_loses_the_literals_that_are_restored(
    make_tiny: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_rewrite, "restore_batch_norms", lambda graph, literals: None)
    model = make_tiny()
    lost = PT2EBackend().prepare(model, torch.zeros(1, 3, 16, 16))
    settings = [node.args[6:8] for node in graph_rewrite.batch_norms(lost.graph_module().graph)]
    assert settings == [(0.1, 1e-5)] * 2, "should this fail, restoring is no longer needed"


def test_the_float_model_and_the_global_generator_are_left_alone(tiny: nn.Module, images: Tensor) -> None:
    before, random = copy.deepcopy(tiny.state_dict()), torch.get_rng_state()
    prepared = PT2EBackend().prepare(tiny.train(), images)
    PT2EBackend().convert(calibrate(prepared, images))
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert tiny.training and prepared.training


def test_conversion_agrees_with_fake_quantization_on_a_trained_net(prepared: PreparedGraph) -> None:
    x = torch.rand(512, 3, 16, 16)
    labels = (x.mean((2, 3)) @ torch.randn(3, 5)).argmax(1)
    calibrate(prepared, x[:64]).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05, momentum=0.9)
    for step in range(16):
        F.cross_entropy(prepared(x[step * 32 : (step + 1) * 32]), labels[step * 32 : (step + 1) * 32]).backward()
        optimizer.step()
        optimizer.zero_grad()
    prepared.eval().observe(False)
    with torch.no_grad():
        fake, integer = prepared(x), PT2EBackend().convert(prepared)(x)
    assert (fake.argmax(1) == integer.argmax(1)).float().mean() >= 0.99
    assert relative(integer, fake) < 0.05
    assert not torch.equal(fake.argmax(1), torch.zeros_like(labels)), "the net tells classes apart"


def test_converting_twice_gives_the_same_bits_and_leaves_the_prepared_model(
    prepared: PreparedGraph, images: Tensor
) -> None:
    calibrate(prepared, images).observe(False)
    expected = prepared(images)
    first, second = PT2EBackend().convert(prepared), PT2EBackend().convert(prepared)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert torch.equal(prepared(images), expected)
    first.train()
    assert torch.equal(first(images), first.eval()(images)), "the mode of a converted model changes nothing"


def test_weights_are_int8_and_convert_needs_no_forward(prepared: PreparedGraph, images: Tensor) -> None:
    ranges = {
        name: value
        for name, value in calibrate(copy.deepcopy(prepared), images).state_dict().items()
        if name.startswith("quantizers.")
    }
    prepared.load_state_dict(ranges, strict=False)
    converted = PT2EBackend().convert(prepared)
    integers = [value for value in converted.state_dict().values() if value.dtype == torch.int8]
    assert sorted(value.numel() for value in integers) == sorted([8 * 3 * 9, 8 * 8 * 9, 5 * 8])


def test_convert_without_ranges_names_what_lacks_them(prepared: PreparedGraph) -> None:
    with pytest.raises(QuantizationError, match="conv1_input"):
        PT2EBackend().convert(prepared)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v3_small", marks=pytest.mark.slow)])
def test_torchvision_models_the_whole_way(name: str) -> None:
    model = draw_statistics(getattr(torchvision.models, name)(num_classes=10)).eval()
    x = torch.rand(4, 3, 32, 32)
    prepared = PT2EBackend().prepare(model, x)
    assert set(model.state_dict()) <= set(prepared.state_dict())
    assert float_error(prepared, model, x) < BOUND
    calibrate(prepared, x).observe(False)
    with torch.no_grad():
        fake = prepared(x)
        converted = PT2EBackend().convert(prepared)
        assert relative(converted(x), fake) < 0.02
        assert bytes_of(converted) < 0.30 * bytes_of(model)
        program = export_converted(converted, x[:1])
        assert torch.equal(program.module()(x), converted(x))
        assert program.module()(x[:3]).shape == (3, 10)
    prepared.train()(x).sum().backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in prepared.parameters()
    )


def test_a_skipped_convolution_stays_float_and_is_not_folded(tiny: nn.Module, images: Tensor) -> None:
    prepared = PT2EBackend().prepare(tiny, images, [rule("conv2")])
    graph = prepared.graph_module().graph
    assert [layer_of(folded.convolution) for folded in graph_rewrite.folded_batch_norms(graph)] == ["conv1"]
    assert "quantizers.conv2_weight" not in dict(prepared.named_modules())
    assert float_error(prepared, tiny, images) < BOUND
    calibrate(prepared, images).observe(False)
    converted = PT2EBackend().convert(prepared)
    assert torch.equal(converted.get_parameter("conv2.weight"), tiny.get_parameter("conv2.weight"))
    assert relative(converted(images), prepared(images)) < 1e-5


def test_a_rule_for_nothing_names_the_nearest_layer(tiny: nn.Module, images: Tensor) -> None:
    with pytest.raises(QuantizationError, match="'convv2' matches no module") as error:
        PT2EBackend().prepare(tiny, images, [rule("convv2")])
    assert "conv2" in error.value.hint


class Variant(nn.Module):
    """A convolution, then what the test puts behind it."""

    def __init__(self, conv: nn.Module, then: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.then = conv, then
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, x)


def test_a_layer_applied_twice_and_a_batch_norm_without_weight_and_dead_channels() -> None:
    def twice(self: nn.Module, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.conv(x)).relu())).mean((2, 3))  # type: ignore[operator]

    x = torch.rand(4, 3, 16, 16)
    for affine in (True, False):
        bn = nn.BatchNorm2d(3, eps=0.01, affine=affine)
        bn.register_buffer("running_var", torch.tensor([1e-5, 0.1, 10.0]))
        if affine:
            bn.weight = nn.Parameter(torch.tensor([0.0, -1e-12, 1.0]))
            bn.bias = nn.Parameter(torch.randn(3))
        model = Variant(nn.Conv2d(3, 3, 3, padding=1), twice, bn=bn).eval()
        nn.init.normal_(model.conv.bias)  # type: ignore[arg-type]
        prepared = PT2EBackend().prepare(model, x)
        assert float_error(prepared, model, x) < BOUND
        calibrate(prepared, x).observe(False)
        torch.testing.assert_close(PT2EBackend().convert(prepared)(x), prepared(x), rtol=1e-4, atol=1e-6)
        prepared.train()(x).sum().backward()
        assert all(
            parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in prepared.parameters()
        )


def plain(self: nn.Module, x: Tensor) -> Tensor:
    return self.conv(x).mean((2, 3))  # type: ignore[operator]


def branching(self: nn.Module, x: Tensor) -> Tensor:
    return plain(self, x) if x.sum() > 0 else -plain(self, x)


def normalised(self: nn.Module, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)).mean((2, 3))  # type: ignore[operator]


def conv(**settings: object) -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        (Variant(conv(), branching), r"cannot trace Variant, test_backend.py line \d+: return self.then", "branches"),
        (Variant(conv(), normalised, bn=nn.BatchNorm2d(4, momentum=None)), "bn: .*momentum=None", "0.1"),
        (
            Variant(conv(), normalised, bn=nn.BatchNorm2d(4, track_running_stats=False)),
            "bn: .*running statistics",
            "track_running_stats=True",
        ),
        (nn.Sequential(nn.Flatten(), nn.Softmax(1)), "nothing that can be quantized", "stages"),
    ],
    ids=[
        "data-dependent",
        "cumulative-average",
        "no-running-statistics",
        "nothing-to-quantize",
    ],
)
def test_what_cannot_be_prepared_says_what_to_change(model: nn.Module, message: str, hint: str) -> None:
    with pytest.raises(QuantizationError, match=message) as error:
        PT2EBackend().prepare(model, torch.zeros(1, 3, 16, 16))
    assert hint in error.value.hint


def test_copies_share_the_blueprint(prepared: PreparedGraph) -> None:
    assert isinstance(prepared.blueprint, Blueprint)
    assert copy.deepcopy(prepared).blueprint is prepared.blueprint
